//! Faults outside any domain have the same effect as in a program without domains.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::arch::asm;
use std::hint::black_box;

use support::signals::install;
use support::{contain, domain, in_child, mistake, suite, works};

suite! {
    a_breakpoint_outside_any_domain_kills_the_process_as_before,
    a_fault_outside_any_domain_kills_the_process_as_before,
    the_programs_stack_overflow_is_reported_as_before,
    a_fault_outside_kills_the_process_as_before,
    a_fault_in_a_handler_that_interrupted_a_domain_is_the_programs,
    a_handler_that_was_there_before_gets_what_is_its_own,
}

fn a_breakpoint_outside_any_domain_kills_the_process_as_before() {
    let _ = domain("bystander");
    // SAFETY: deliberately unsound: the fault under test.
    let status = in_child(|| unsafe { asm!("int3") });
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGTRAP, "{status:#x}");
}

fn a_fault_outside_any_domain_kills_the_process_as_before() {
    let _ = domain("bystander");
    let status = in_child(mistake);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
}

fn the_programs_stack_overflow_is_reported_as_before() {
    #[allow(unconditional_recursion, reason = "overflowing the stack is the point")]
    fn recurse(depth: u64) -> u64 {
        black_box(&[depth; 16])[3] + recurse(depth + 1)
    }
    let mut domain = domain("bystander");
    works(&mut domain);
    for thread in [false, true] {
        let mut pipe = [0; 2];
        // SAFETY: the array has room for two descriptors.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
        let status = in_child(|| {
            // SAFETY: both descriptors are open.
            unsafe { libc::dup2(pipe[1], 2) };
            if thread {
                let overflow = || {
                    contain(&mut support::domain("of thread"), mistake);
                    recurse(0)
                };
                std::thread::spawn(overflow).join().unwrap();
            } else {
                black_box(recurse(0));
            }
        });
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{status:#x}");
        let mut text = [0u8; 512];
        // SAFETY: the buffer has that many bytes.
        let length = unsafe { libc::read(pipe[0], text.as_mut_ptr().cast(), text.len()) };
        let text = String::from_utf8_lossy(&text[..usize::try_from(length).unwrap()]).into_owned();
        assert!(text.contains("has overflowed its stack"), "{text}");
    }
}

fn a_fault_outside_kills_the_process_as_before() {
    let _ = domain("bystander");
    let status = in_child(mistake);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
    // SAFETY: `abort` has no preconditions.
    let status = in_child(|| unsafe { libc::abort() });
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{status:#x}");
}

fn a_fault_in_a_handler_that_interrupted_a_domain_is_the_programs() {
    extern "C" fn wrong(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        mistake();
    }
    let mut domain = domain("innocent");
    install(libc::SIGALRM, wrong, 0);
    // SAFETY: `raise` has no preconditions.
    let status = in_child(|| drop(domain.call(|| unsafe { libc::raise(libc::SIGALRM) })));
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
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
    // SAFETY: a zeroed sigaction is valid, and the handler only does what handlers may do.
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
    assert_eq!(SEEN.load(Ordering::Relaxed), 0, "the program's handler does not see faults in a domain");
}
