//! Faults in domains are handled even if the program sets signal masks or a signal stack.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use pkru_userspace::Domain;
use support::{contain, domain, mistake, suite};

suite! {
    a_mask_that_would_block_faults,
    code_in_a_domain_cannot_block_the_signals_of_faults,
    a_thread_that_blocks_every_signal,
    a_program_with_a_signal_stack_of_its_own,
}

fn a_mask_that_would_block_faults() {
    let mut domain = domain("masked");
    // SAFETY: the set is filled before it is used.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        assert_eq!(libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()), 0);
        contain(&mut domain, mistake);
        assert_eq!(libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut()), 0);
        contain(&mut domain, mistake);
        let mut now: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut now);
        assert_eq!(
            (libc::sigismember(&raw const now, libc::SIGUSR1), libc::sigismember(&raw const now, libc::SIGSEGV)),
            (1, 0)
        );
    }
}

fn code_in_a_domain_cannot_block_the_signals_of_faults() {
    let mut domain = domain("masker");
    // SAFETY: the set is filled before it is used.
    let block = || unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut())
    };
    contain(&mut domain, || {
        block();
        mistake();
    });
    assert_eq!(domain.call(block).unwrap(), 0);
    contain(&mut domain, mistake);
}

fn a_thread_that_blocks_every_signal() {
    drop(domain("first"));
    let blocked = std::thread::spawn(|| {
        // SAFETY: the set is filled before it is used.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        }
        let mut domain = Domain::builder("blocked").build().unwrap();
        contain(&mut domain, mistake);
    });
    blocked.join().unwrap();
}

fn a_program_with_a_signal_stack_of_its_own() {
    let mut domain = domain("stack");
    let stack = vec![0u8; 256 * 1024].leak();
    let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    let status = support::in_child(|| {
        // SAFETY: the stack is leaked.
        assert_eq!(unsafe { libc::sigaltstack(&raw const new, std::ptr::null_mut()) }, 0);
        contain(&mut domain, mistake);
    });
    assert_eq!(status, 0);
}
