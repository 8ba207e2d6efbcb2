//! Forks, and domains in the children.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use pkru_userspace::Domain;
use support::{contain, domain, mistake, small, suite, works};

suite! {
    a_childs_domains_work,
    forks_while_other_threads_run_in_domains,
    a_fork_in_a_callback,
    forks_in_the_middle_of_other_things,
    the_children_of_a_fork_have_domains_that_work,
    a_copy_of_the_process_made_in_a_domain_ends,
}

fn forks_in_the_middle_of_other_things() {
    unsafe extern "C" {
        fn pthread_atfork(before: Option<Handler>, parent: Option<Handler>, child: Option<Handler>) -> i32;
    }
    type Handler = extern "C" fn();
    extern "C" fn set_a_handler() {
        // SAFETY: `SIG_IGN` is not a function.
        unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
    }
    // Registered before the first domain. It runs after pkru-userspace's handlers before a fork, and before them after
    // the fork.
    let handler = Some(set_a_handler as Handler);
    // SAFETY: the handler only calls `signal`.
    assert_eq!(unsafe { pthread_atfork(handler, handler, handler) }, 0);
    struct Forks;
    impl Drop for Forks {
        fn drop(&mut self) {
            in_child(|| ());
            let mut mask = 0u64;
            // SAFETY: the kernel writes eight bytes.
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut mask, 8) };
            assert_eq!(mask, 0, "no signal stays blocked");
            contain(&mut small("late").build().unwrap(), mistake);
        }
    }
    thread_local! { static LATE: Forks = const { Forks } }
    let mut domain = domain("first");
    std::thread::spawn(|| {
        LATE.with(|_| ());
        in_child(|| ());
    })
    .join()
    .unwrap();
    in_child(|| drop(contain(&mut domain, mistake)));
    contain(&mut domain, mistake);
}

/// Runs a function in a child, and checks that it returns.
fn in_child(function: impl FnOnce()) {
    assert_eq!(support::in_child(function), 0);
}

fn a_childs_domains_work() {
    let mut domain = domain("parent");
    let word = domain.call(|| Box::leak(Box::new(5u64)) as *mut u64 as u64).unwrap();
    let mut parked: Vec<_> = (0..20).map(|_| small("parked").build().unwrap()).collect();
    in_child(|| {
        // SAFETY: the word is on the domain's heap.
        assert_eq!(domain.call(|| unsafe { *(word as *const u64) }).unwrap(), 5);
        contain(&mut domain, mistake);
        parked.iter_mut().for_each(works);
        let more: Vec<_> = (0..20).map(|_| small("of the child").build().unwrap()).collect();
        drop(more);
        std::thread::spawn(|| contain(&mut small("thread").build().unwrap(), mistake)).join().unwrap();
    });
    // SAFETY: as above.
    assert_eq!(domain.call(|| unsafe { *(word as *const u64) }).unwrap(), 5, "the child did not change the parent's");
    parked.iter_mut().for_each(works);
}

fn forks_while_other_threads_run_in_domains() {
    drop(domain("first"));
    static STOP: AtomicBool = AtomicBool::new(false);
    let barrier = Arc::new(Barrier::new(5));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let barrier = Arc::clone(&barrier);
            std::thread::spawn(move || {
                let mut domains: Vec<_> = (0..6).map(|_| small("busy").build().unwrap()).collect();
                barrier.wait();
                while !STOP.load(Ordering::Relaxed) {
                    domains.iter_mut().for_each(works);
                    domains[0].call(mistake).unwrap_err();
                }
            })
        })
        .collect();
    barrier.wait();
    for _ in 0..20 {
        in_child(|| {
            // The child has only this thread. Calls of other threads no longer pin keys.
            let mut domains: Vec<_> = (0..30).map(|_| small("of the child").build().unwrap()).collect();
            domains.iter_mut().for_each(works);
            contain(&mut domains[7], mistake);
        });
    }
    STOP.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn a_fork_in_a_callback() {
    let mut domain = domain("forker");
    let mut child_status = 1;
    let result = domain.call_with(
        &mut [&mut |_| {
            in_child(|| works(&mut small("of the child").build().unwrap()));
            child_status = 0;
            3
        }],
        |callbacks| {
            // SAFETY: a callback takes up to six words and returns one.
            let ask: extern "C" fn() -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
            ask()
        },
    );
    assert_eq!((result.unwrap(), child_status), (3, 0));
}

fn the_children_of_a_fork_have_domains_that_work() {
    let mut domain = domain("parent");
    works(&mut domain);
    let status = support::in_child(|| {
        contain(&mut domain, mistake);
        contain(&mut Domain::builder("child").build().unwrap(), mistake);
    });
    assert_eq!(status, 0);
    contain(&mut domain, mistake);
}

fn a_copy_of_the_process_made_in_a_domain_ends() {
    let mut domain = domain("fork");
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: deliberately unsound: it forks without the C library, and the copy faults.
    let child = domain.call(|| unsafe {
        let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
        if child == 0 {
            mistake();
        }
        child
    });
    // Only the parent gets here.
    // SAFETY: both descriptors are this process's.
    unsafe { libc::write(pipe[1], b"x".as_ptr().cast(), 1) };
    let mut status = 0;
    // SAFETY: the status is writable.
    unsafe { libc::waitpid(child.unwrap() as i32, &raw mut status, 0) };
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1, "{status:#x}");
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer has eight bytes.
    assert_eq!(unsafe { libc::read(pipe[0], bytes.as_mut_ptr().cast(), 8) }, 1);
}
