//! A million calls and a hundred thousand rewinds over eight threads leave nothing behind.

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
/// One call in so many goes wrong.
const FAULTY: u64 = 10;

/// What could leak: KiB in memory, mappings, protection keys.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Footprint {
    resident: usize,
    mappings: usize,
    keys: usize,
}

impl Footprint {
    fn now() -> Self {
        // On the stack: measuring must not change what is measured.
        let mut text = [0; 1 << 16];
        // This counts pages. What /proc/self/statm says can be off by some pages for each CPU.
        let rollup = read("/proc/self/smaps_rollup", &mut text);
        let line = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
        let resident = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        let mappings = read("/proc/self/maps", &mut text).lines().count();
        Self { resident, mappings, keys: keys_in_use() }
    }
}

/// Maps every page of the files in memory, as running all of the code in them would. Code that runs only when two
/// threads meet (a lock that is taken, a heap that is busy) is otherwise mapped whenever that is, 64 KiB at a time.
fn map_all_file_pages() {
    let mut text = [0; 1 << 16];
    for line in read("/proc/self/maps", &mut text).lines().filter(|line| line.contains(" r") && line.contains(" /")) {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).unwrap());
        // SAFETY: only reads pages that are there.
        let done = unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_POPULATE_READ) };
        assert_eq!(done, 0, "{line}: {}", std::io::Error::last_os_error());
    }
}

/// All of a file of text, into memory that is there already.
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

fn a_million_calls_and_a_hundred_thousand_rewinds() {
    let mut domains = vec![domain("soak")];
    // Before Linux 6.7 the stack of a thread, which is 2 MiB long, can become one huge page at any time, where it
    // happens to be aligned. Memory of domains has none anyway.
    // SAFETY: changes how the kernel backs memory, not what is in it.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) }, 0);
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
        map_all_file_pages();
        // For the pages of the stack that measuring takes.
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
