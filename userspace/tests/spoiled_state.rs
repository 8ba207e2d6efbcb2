//! Code in a domain that changes registers, rights and the stack pointer. The gate restores the caller's.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::arch::asm;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pkru_userspace::{Access, Domain, ViolationKind};
use support::{Notice, contain, domain, mistake, suite};

suite! {
    a_spoiled_fs_base,
    spoiled_registers_are_restored,
    a_jump_to_32_bit_code,
    a_stack_pointer_in_the_signal_stack,
    memory_made_executable_only,
    a_return_with_another_domains_key,
    opening_the_key_of_a_running_domain,
}

fn a_spoiled_fs_base() {
    thread_local! { static WORD: std::cell::Cell<u32> = const { std::cell::Cell::new(1) } }
    let mut domain = domain("fs");
    WORD.set(7);
    // The gate restores the caller's FS base.
    // SAFETY: deliberately unsound: the mistake under test.
    let _ = domain.call(|| unsafe { asm!("wrfsbase {}", in(reg) 0x1000_u64) });
    assert_eq!(WORD.get(), 7);
    // Using a thread-local with a wrong FS base is a violation.
    let violation = domain.call(|| {
        // SAFETY: deliberately unsound: the mistake under test.
        unsafe { asm!("wrfsbase {}", in(reg) 0x1000_u64) };
        WORD.get()
    });
    assert!(violation.is_err());
    assert_eq!(WORD.get(), 7);
    support::works(&mut domain);
}

fn a_jump_to_32_bit_code() {
    let mut domain = domain("far");
    // Offset and selector of Linux's 32-bit code segment. A far return does not work here, because
    // QEMU 7.2 reads its stack with kernel privileges.
    let target = [0x1000_u32, 0x23];
    // SAFETY: deliberately unsound: the mistake under test.
    let violation =
        contain(&mut domain, || unsafe { asm!("jmp fword ptr [{}]", in(reg) &raw const target, options(noreturn)) });
    assert_eq!(*violation.kind(), ViolationKind::Null { address: 0x1000, access: Access::Execute });
}

fn a_stack_pointer_in_the_signal_stack() {
    let mut domain = domain("lost");
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the struct is writable.
    unsafe { libc::syscall(libc::SYS_sigaltstack, std::ptr::null::<libc::stack_t>(), &raw mut stack) };
    for offset in [64, 200, 2000, 8000] {
        let place = stack.ss_sp as usize + offset;
        // SAFETY: deliberately unsound: the mistake under test.
        contain(&mut domain, || unsafe { asm!("mov rsp, {}", "ud2", in(reg) place, options(noreturn)) });
    }
}

fn memory_made_executable_only() {
    let mut domain = domain("exec");
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping touches nothing that exists.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0) };
    // Linux allocates a key for execute-only memory and changes the thread's rights to it.
    // SAFETY: the page belongs to the test.
    let protect = || unsafe { libc::syscall(libc::SYS_mprotect, page, 4096, libc::PROT_EXEC) };
    assert_eq!(domain.call(protect).unwrap(), 0);
    contain(&mut domain, mistake);
    assert_eq!(domain.call(protect).unwrap(), 0);
    contain(&mut domain, || {
        protect();
        mistake();
    });
}

/// Runs a function while the domain `other` runs on another thread. Passes the number of the domain's key.
fn while_another_runs(mut other: Domain, something: impl FnOnce(u64)) {
    static IS_OVER: AtomicBool = AtomicBool::new(false);
    let key = u64::from(other.key().unwrap().number());
    let begun = Notice::new();
    let begins = Arc::clone(&begun);
    let running = std::thread::spawn(move || {
        other.call(|| {
            begins.give();
            while !IS_OVER.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        })
    });
    begun.wait();
    something(key);
    IS_OVER.store(true, Ordering::Relaxed);
    running.join().unwrap().expect("the other domain's call returns");
}

fn a_return_with_another_domains_key() {
    let other = domain("other");
    let mut domain = domain("liar");
    // The return address to the gate is at the top of the domain's stack, below the mailbox page.
    let lie = |key: u64| {
        let stack: u64;
        // SAFETY: reading the stack pointer changes nothing.
        unsafe { asm!("mov {}, rsp", out(reg) stack) };
        let top = (stack + 4096) & !4095;
        // SAFETY: deliberately unsound: the mistake under test.
        unsafe {
            asm!("mov rbx, {}", "mov rsp, {}", "xor eax, eax", "ret", in(reg) key, in(reg) top - 8, options(noreturn));
        }
    };
    let own = u64::from(domain.key().unwrap().number());
    domain
        .call(|| {
            if black_box(true) {
                lie(own)
            }
        })
        .expect("control: with its own key the call returns");
    let idle = u64::from(other.key().unwrap().number());
    let violation = contain(&mut domain, || lie(idle));
    assert!(matches!(violation.kind(), ViolationKind::Null { .. }), "the idle domain has no context: {violation}");
    while_another_runs(other, |key| {
        let violation = contain(&mut domain, || lie(key));
        assert_eq!(*violation.kind(), ViolationKind::IllegalInstruction, "the gate detects the wrong key");
    });
}

fn opening_the_key_of_a_running_domain() {
    let other = domain("other");
    let mut domain = domain("opener");
    while_another_runs(other, |key| {
        let rights = !(3u32 << (2 * key));
        // The violation is attributed to the domain that runs on this thread, whatever its rights are.
        contain(&mut domain, || {
            // SAFETY: deliberately unsound: the domain changes its own rights.
            unsafe {
                asm!("rdpkru", "and eax, {:e}", "wrpkru", in(reg) rights, out("eax") _, in("ecx") 0, out("edx") _);
            }
            mistake();
        });
    });
}

fn spoiled_registers_are_restored() {
    let mut domain = domain("registers");
    let mxcsr = || {
        let mut value = 0u32;
        // SAFETY: the instruction stores four bytes.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value) };
        value
    };
    let x87 = || {
        let mut environment = [0u32; 7];
        // SAFETY: `fnstenv` stores 28 bytes. It also masks exceptions, and `fldcw` restores the control word.
        unsafe { asm!("fnstenv [{0}]", "fldcw [{0}]", in(reg) &raw mut environment) };
        // The control word and the tag word.
        (environment[0] as u16, environment[2] as u16)
    };
    let gs_base = || {
        let base: u64;
        // SAFETY: reading the base changes nothing.
        unsafe { asm!("rdgsbase {}", out(reg) base) };
        base
    };
    let before = (mxcsr(), x87(), gs_base());
    let spoil = || {
        // A different rounding mode in MXCSR, and a different precision in the x87 control word.
        let (rounding, precision) = (0x7f80_u32, 0x007f_u32);
        // SAFETY: deliberately unsound: it violates the ABI by not restoring this state.
        unsafe {
            asm!("ldmxcsr [{}]", "fldz", "fldcw [{}]", in(reg) &raw const rounding, in(reg) &raw const precision);
            asm!("wrgsbase {}", in(reg) 0x1234_5000_u64);
            asm!("std", "pushfq", "or dword ptr [rsp], 0x44000", "popfq");
        };
    };
    domain.call(spoil).unwrap();
    let flags: u64;
    // SAFETY: reading the flags changes nothing.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
    assert_eq!(flags & 0x44400, 0, "AC, NT and DF");
    assert_eq!((mxcsr(), x87(), gs_base()), before);
    assert_eq!(black_box(1.0_f64) / black_box(3.0), 1.0 / 3.0);
}
