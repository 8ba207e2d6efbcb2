//! A million calls and a hundred thousand rewinds on eight threads leak nothing.

use std::fs::File;
use std::io::Read;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pkru_userspace::Domain;
use support::{domain, mistake, suite};

suite! {
    a_million_calls_and_a_hundred_thousand_rewinds,
}

const THREADS: u64 = 8;
const CALLS: u64 = 1_000_000;
/// One in this many calls faults.
const FAULTY: u64 = 10;

/// Resources that could leak. `resident` is in KiB.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Footprint {
    resident: usize,
    mappings: usize,
    keys: usize,
}

impl Footprint {
    fn now() -> Self {
        // On the stack, so that measuring does not allocate.
        let mut text = [0; 1 << 16];
        // This is exact. The value in /proc/self/statm can be off by some pages per CPU.
        let rollup = read("/proc/self/smaps_rollup", &mut text);
        let line = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
        let resident = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        let mappings = read("/proc/self/maps", &mut text).lines().count();
        Self { resident, mappings, keys: keys_in_use() }
    }
}

/// Maps every page of the mapped files, as if all their code had run. Otherwise the kernel maps code that only runs
/// under contention at its first use, 64 KiB at a time, which would look like a leak.
fn map_all_file_pages() {
    let mut text = [0; 1 << 16];
    for line in read("/proc/self/maps", &mut text).lines().filter(|line| line.contains(" r") && line.contains(" /")) {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).unwrap());
        // SAFETY: the call only populates existing mappings.
        let done = unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_POPULATE_READ) };
        assert_eq!(done, 0, "{line}: {}", std::io::Error::last_os_error());
    }
}

/// Reads a text file into `text`.
fn read<'a>(path: &str, text: &'a mut [u8]) -> &'a str {
    let mut file = File::open(path).unwrap();
    let mut length = 0;
    loop {
        match file.read(&mut text[length..]).unwrap() {
            0 => break,
            more => length += more,
        }
    }
    assert!(length < text.len(), "{path} is longer than expected");
    std::str::from_utf8(&text[..length]).unwrap()
}

/// Returns how many protection keys this process has allocated: fifteen minus what a forked child can still allocate.
fn keys_in_use() -> usize {
    // SAFETY: the child only makes system calls.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "cannot fork");
    if child == 0 {
        let mut free = 0;
        // SAFETY: the calls touch no memory.
        while unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) } > 0 {
            free += 1;
        }
        // SAFETY: `_exit` runs none of the parent's exit handlers.
        unsafe { libc::_exit(15 - free) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(libc::WIFEXITED(status));
    libc::WEXITSTATUS(status) as usize
}

/// Makes calls. Returns how many of them were rewound.
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

fn a_million_calls_and_a_hundred_thousand_rewinds() {
    let mut domains = vec![domain("soak")];
    // Before Linux 6.7 a thread's stack of 2 MiB can become a huge page at any time if it is aligned, which changes the
    // resident size. Domain memory never has huge pages.
    // SAFETY: the call does not change memory contents.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) }, 0);
    domains.extend((1..THREADS).map(|_| Domain::builder("soak").build().unwrap()));
    let rewinds = AtomicU64::new(0);
    let barrier = Barrier::new(THREADS as usize + 1);
    let (before, after, time) = std::thread::scope(|scope| {
        for domain in &mut domains {
            let (rewinds, barrier) = (&rewinds, &barrier);
            scope.spawn(move || {
                // Both rounds run the same code, so the second touches no new pages of the program.
                for calls in [1000, CALLS] {
                    rewinds.fetch_add(work(domain, calls / THREADS), Ordering::Relaxed);
                    // Each domain's last call succeeds, so all hold the same amount of memory.
                    domain.call(|| ()).unwrap();
                    barrier.wait();
                    barrier.wait();
                }
            });
        }
        // The threads exist at both measurements.
        barrier.wait();
        map_all_file_pages();
        // Touches the stack pages that a measurement needs.
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
    assert_eq!(after, before);
}
