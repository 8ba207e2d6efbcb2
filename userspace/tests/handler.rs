//! A handler that the program had before its first domain. A suite of its own, because it needs a process of its own.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

use std::arch::asm;

use support::{contain, domain, suite};

suite! {
    a_handler_that_was_there_before_gets_what_is_its_own,
}

fn a_handler_that_was_there_before_gets_what_is_its_own() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn handler(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: the kernel passes valid pointers.
        SEEN.store(unsafe { (*info).si_addr() } as usize, Ordering::Relaxed);
        // SAFETY: as above; the faulting instruction below is two bytes long.
        unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] += 2 };
    }
    // SAFETY: a zeroed sigaction is valid, and the handler keeps to what handlers may do.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut());
    }
    let mut domain = domain("bystander");
    // SAFETY: the handler skips the instruction: `mov [rax], cl` has two bytes.
    let fault = || unsafe { asm!("mov [rax], cl", in("rax") 0x123, in("cl") 0_u8) };
    fault();
    assert_eq!(SEEN.load(Ordering::Relaxed), 0x123);
    SEEN.store(0, Ordering::Relaxed);
    contain(&mut domain, fault);
    assert_eq!(SEEN.load(Ordering::Relaxed), 0, "a fault in a domain is not passed on");
}
