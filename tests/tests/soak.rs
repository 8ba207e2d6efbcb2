//! A million calls and a hundred thousand rewinds over eight threads leave nothing behind.

#[path = "../../userspace/tests/common/mod.rs"]
#[macro_use]
mod common;

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use common::{domain, mistake};
use pkru_userspace::Domain;

const THREADS: u64 = 8;
const CALLS: u64 = 1_000_000;
/// One call in so many goes wrong.
const FAULTY: u64 = 10;

/// What could leak: KiB in memory, mappings, protection keys.
#[derive(Debug, Clone, Copy)]
struct Footprint {
    resident: usize,
    mappings: usize,
    keys: usize,
}

impl Footprint {
    fn now() -> Self {
        // This counts pages. What /proc/self/statm says can be off by some pages for each CPU.
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let line = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
        let resident = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        let mappings = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
        Self { resident, mappings, keys: keys_in_use() }
    }
}

/// How many protection keys this process has taken: what a copy of it can still take is missing from fifteen.
fn keys_in_use() -> usize {
    // SAFETY: the child makes system calls only.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut free = 0;
        // SAFETY: the calls touch no memory.
        while unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) } > 0 {
            free += 1;
        }
        // SAFETY: leaves without running anything of the parent's.
        unsafe { libc::_exit(15 - free) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(libc::WIFEXITED(status));
    libc::WEXITSTATUS(status) as usize
}

/// Makes calls; returns how many of them were rewound.
fn work(domain: &mut Domain, calls: u64) -> u64 {
    let mut rewinds = 0;
    for number in 0..calls {
        if number % FAULTY == 0 {
            domain.call(mistake).unwrap_err();
            rewinds += 1;
        } else {
            let text = domain.call(|| format!("call {number}")).unwrap();
            assert!(text.ends_with(char::is_numeric));
        }
    }
    rewinds
}

#[test]
fn a_million_calls_and_a_hundred_thousand_rewinds() {
    let mut domains = vec![need!(domain("soak"))];
    domains.extend((1..THREADS).map(|_| Domain::builder("soak").build().unwrap()));
    let rewinds = AtomicU64::new(0);
    let barrier = Barrier::new(THREADS as usize + 1);
    let (before, after, time) = std::thread::scope(|scope| {
        for domain in &mut domains {
            let (rewinds, barrier) = (&rewinds, &barrier);
            scope.spawn(move || {
                // The same code for both, so that the second touches no page of the program for the first time.
                for calls in [1000, CALLS] {
                    rewinds.fetch_add(work(domain, calls / THREADS), Ordering::Relaxed);
                    // Every domain's last call is a good one: all hold as much.
                    domain.call(|| ()).unwrap();
                    barrier.wait();
                    barrier.wait();
                }
            });
        }
        // The threads are there at both times.
        barrier.wait();
        Footprint::now();
        let before = Footprint::now();
        let start = Instant::now();
        barrier.wait();
        barrier.wait();
        let (after, time) = (Footprint::now(), start.elapsed());
        barrier.wait();
        (before, after, time)
    });
    let rewinds = rewinds.into_inner();
    println!("figure: {CALLS} calls, {rewinds} of them rewound, on {THREADS} threads, in {} s", time.as_secs());
    println!("figure: after the first 1,000: {before:?}");
    println!("figure: at the end:            {after:?}");
    assert!(rewinds >= CALLS / FAULTY);
    assert_eq!((after.mappings, after.keys), (before.mappings, before.keys));
    // What the kernel maps around a page of a file that is touched late is 64 KiB; a byte lost in each call would make
    // a thousand.
    assert!(after.resident <= before.resident + 128, "{before:?}, then {after:?}");
}
