//! A failure of each system call, once and for a while: what is asked for fails with an error or works, and afterwards
//! everything works and nothing is lost.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pkru_userspace::{Builder, Domain, Error, Globals, Region, RegionAccess, Vault, Violation, ViolationKind};
use support::failing::{Calls, MOST, shared};
use support::signals::{COUNT, count, install};
use support::{in_child, loop_forever, mistake, small, suite};

suite! {
    #[on_first_thread] one_call_fails,
    #[on_first_thread] calls_fail_for_a_while,
}

/// The most protection keys that domains get, so that few domains make them move.
const KEYS: usize = 6;

/// What a process has, to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    /// The sizes of all mappings but the allocator's, in bytes.
    mapped: usize,
    /// How many domains have a key when more have been called.
    keys: usize,
}

/// Where children leave what they had.
struct Shared {
    calls: &'static Calls,
    holdings: &'static [AtomicUsize; 3],
}

/// One run of everything that makes system calls. While calls fail, errors are accepted.
struct Scenario {
    calls: &'static Calls,
    is_strict: bool,
    refused: usize,
}

impl Scenario {
    fn step(&mut self, number: usize, function: impl FnOnce(&mut Self)) {
        self.calls.step.store(number, Ordering::Relaxed);
        function(self);
    }

    /// Returns a result, or `None` if a system call failed.
    #[track_caller]
    fn accept<T>(&mut self, result: Result<T, Error>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        assert!(!self.is_strict, "nothing fails any more: {error}");
        self.refused += 1;
        let is_expected = matches!(
            error,
            Error::System { .. } | Error::KeysRefused { .. } | Error::KeysExhausted { .. } | Error::LibraryInUse { .. }
        );
        assert!(is_expected, "{error}");
        None
    }

    /// Does the same with the outcome of a call.
    #[track_caller]
    fn accept_call<T>(&mut self, result: Result<T, Violation>) -> Option<Result<T, Violation>> {
        match &result {
            Err(violation) => match violation.kind() {
                ViolationKind::NotReady(error) => {
                    self.accept::<()>(Err(error.clone()));
                    None
                }
                _ => Some(result),
            },
            Ok(_) => Some(result),
        }
    }

    fn build(&mut self, builder: Builder) -> Option<Domain> {
        self.accept(builder.build())
    }

    #[track_caller]
    fn works(&mut self, domain: &mut Domain) {
        let result = domain.call(|| (1..=10).map(|n| n * n).collect::<Vec<u32>>());
        if let Some(result) = self.accept_call(result) {
            assert_eq!(result.unwrap().iter().sum::<u32>(), 385);
        }
    }

    fn faults(&mut self, domain: &mut Domain) {
        if let Some(result) = self.accept_call(domain.call(mistake)) {
            assert!(matches!(result.unwrap_err().kind(), ViolationKind::Null { .. }));
        }
        self.works(domain);
    }

    /// Runs all steps. Returns domains that are in use, and what the process holds when they are gone but for those.
    fn run(&mut self) -> Vec<Domain> {
        let mut kept: Vec<_> = Vec::new();
        self.step(1, |it| kept.extend(it.build(small("first"))));
        for domain in &mut kept {
            self.step(2, |it| it.works(domain));
            self.step(3, |it| it.faults(domain));
            self.step(4, |it| {
                domain.discard();
                it.works(domain);
            });
        }
        self.step(5, |it| kept.extend((0..KEYS).filter_map(|_| it.build(small("many"))).collect::<Vec<_>>()));
        self.step(6, |it| kept.iter_mut().for_each(|domain| it.works(domain)));
        self.step(7, |it| {
            let mut domain = it.build(small("on another thread"));
            let mut here = Self { refused: 0, ..*it };
            // std ends the program where it cannot set up a thread.
            let is_on = it.calls.is_on.swap(false, Ordering::Relaxed);
            let thread = std::thread::spawn(move || {
                here.calls.is_on.store(is_on, Ordering::Relaxed);
                domain.iter_mut().for_each(|domain| here.faults(domain));
                drop(domain);
                here.calls.is_on.store(false, Ordering::Relaxed);
                here.refused
            });
            it.refused += thread.join().unwrap();
            it.calls.is_on.store(is_on, Ordering::Relaxed);
        });
        self.step(8, |it| {
            if let Some(vault) = it.accept(Vault::new([7u8; 32])) {
                assert_eq!(vault.with(|bytes| bytes[31]), 7);
            }
        });
        self.step(9, Self::use_a_region);
        self.step(10, Self::call_back);
        self.step(11, |it| {
            if let Some(mut domain) = it.build(small("limited").deadline(Duration::from_millis(20)))
                && let Some(result) = it.accept_call(domain.call(loop_forever))
            {
                assert_eq!(*result.unwrap_err().kind(), ViolationKind::Deadline);
            }
        });
        self.step(12, Self::change_mappings);
        self.step(13, Self::own_a_library);
        self.step(14, |it| {
            // SAFETY: the domain writes no static.
            if let Some(mut domain) = it.build(unsafe { small("open").globals(Globals::Writable) }) {
                it.faults(&mut domain);
            }
        });
        kept
    }

    fn use_a_region(&mut self) {
        let Some(region) = self.accept(Region::new(4096)) else { return };
        region.write(0, b"region");
        let Some(mut domain) = self.build(small("of the region").region(&region, RegionAccess::ReadWrite)) else {
            return;
        };
        let first = region.as_ptr();
        // SAFETY: the region is mapped while it lives.
        if let Some(result) = self.accept_call(domain.call(|| unsafe { first.write(b'R') })) {
            result.unwrap();
            let mut bytes = [0; 6];
            region.read(0, &mut bytes);
            assert_eq!(&bytes, b"Region");
        }
    }

    fn call_back(&mut self) {
        let Some(mut domain) = self.build(small("calls back")) else { return };
        let mut others: Vec<_> = (0..KEYS).filter_map(|_| self.build(small("called back"))).collect();
        let mut refused = 0;
        // So many that the domain loses its key meanwhile.
        let result = domain.call_with(
            &mut [&mut |arguments| {
                others.iter_mut().for_each(|other| refused += usize::from(other.call(|| ()).is_err()));
                arguments.word(0) + 1
            }],
            |callbacks| {
                // SAFETY: the pointer is that of a function with up to six words.
                let next: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
                next(41)
            },
        );
        assert!(refused == 0 || !self.is_strict);
        if let Some(result) = self.accept_call(result) {
            assert_eq!(result.unwrap(), 42);
        }
    }

    /// Code in a domain maps, protects and unmaps, and opens and closes.
    fn change_mappings(&mut self) {
        let Some(mut domain) = self.build(small("maps")) else { return };
        let result = domain.call(|| map_and_open().map_err(|errno| errno as u32));
        if let Some(result) = self.accept_call(result)
            && let Err(errno) = result.unwrap()
        {
            let is_expected = matches!(errno as c_int, libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::EPERM);
            assert!(is_expected && !self.is_strict, "{}", std::io::Error::from_raw_os_error(errno as c_int));
        }
        self.faults(&mut domain);
    }

    fn own_a_library(&mut self) {
        // SAFETY: the program uses the library in this domain only.
        if let Some(mut domain) = self.build(unsafe { small("of the library").library("libz.so") }) {
            // SAFETY: it has no preconditions.
            if let Some(result) = self.accept_call(domain.call(|| unsafe { zlibCompileFlags() })) {
                assert_ne!(result.unwrap(), 0);
            }
            self.faults(&mut domain);
        }
    }
}

#[link(name = "z")]
unsafe extern "C" {
    fn zlibCompileFlags() -> u64;
}

/// In a domain. Returns the first error.
fn map_and_open() -> Result<(), c_int> {
    fn check(is_good: bool) -> Result<(), c_int> {
        if is_good { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    }
    const SIZE: usize = 4 * 4096;
    let (both, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the memory is new, and used by nothing else; so is the descriptor.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), SIZE, both, flags, -1, 0);
        check(start != libc::MAP_FAILED)?;
        start.cast::<u64>().write(1);
        check(libc::mprotect(start, 4096, libc::PROT_READ) == 0)?;
        check(libc::madvise(start, SIZE, libc::MADV_WILLNEED) == 0)?;
        check(libc::mlock(start, SIZE) == 0)?;
        check(libc::munlock(start, SIZE) == 0)?;
        check(libc::munmap(start.byte_add(4096), 4096) == 0)?;
        check(libc::mprotect(start, 4096, both) == 0)?;
        let file = libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY);
        check(file >= 0)?;
        let mapped: *mut c_void = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE, file, 0);
        // Files in /proc cannot be mapped.
        check(mapped == libc::MAP_FAILED)?;
        let other = libc::dup(file);
        check(other >= 0)?;
        check(libc::dup2(file, other) == other)?;
        check(libc::close(other) == 0)?;
        check(libc::close(file) == 0)
    }
}

fn holdings(domains: &mut Vec<Domain>) -> Holdings {
    domains.iter_mut().for_each(support::works);
    let keys = domains.iter().filter(|domain| domain.key().is_some()).count();
    domains.clear();
    // Mappings that could not be unmapped are tried again when another is made.
    drop(support::build(small("last")));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let others = maps.lines().filter(|line| !line.contains("[heap]") && !line.contains("[stack]"));
    let sizes = others.map(|line| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).unwrap());
        end - start
    });
    Holdings { mapped: sizes.sum(), descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(), keys }
}

/// Runs the scenario in a child while calls fail, and again when none does.
fn run(shared: &Shared, first: usize, failures: usize) -> Option<Holdings> {
    let calls = shared.calls;
    calls.count.store(0, Ordering::Relaxed);
    calls.first.store(first, Ordering::Relaxed);
    calls.failures.store(failures, Ordering::Relaxed);
    let status = in_child(|| {
        // All blocks lie in one piece of memory, so that only this crate's mappings come and go.
        // SAFETY: the calls set parameters of the allocator.
        unsafe {
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_ARENA_MAX, 1);
            // A run that waits for ever is killed.
            libc::alarm(600);
        }
        install(libc::SIGUSR1, count, 0);
        pkru_userspace::set_key_limit(KEYS);
        calls.supervise();
        // The C library keeps the stacks of threads, for the next ones.
        std::thread::spawn(|| ()).join().unwrap();
        calls.is_on.store(true, Ordering::Relaxed);
        let mut scenario = Scenario { calls, is_strict: failures == 0, refused: 0 };
        let mut kept = scenario.run();
        calls.is_on.store(false, Ordering::Relaxed);
        raise_and_look();
        scenario.is_strict = true;
        kept.iter_mut().for_each(|domain| scenario.faults(domain));
        let mut more = scenario.run();
        kept.clear();
        raise_and_look();
        let Holdings { descriptors, mapped, keys } = holdings(&mut more);
        for (place, value) in shared.holdings.iter().zip([descriptors, mapped, keys]) {
            place.store(value, Ordering::Relaxed);
        }
    });
    let [descriptors, mapped, keys] = [0, 1, 2].map(|index| shared.holdings[index].load(Ordering::Relaxed));
    (status == 0).then_some(Holdings { descriptors, mapped, keys })
}

/// Checks that the program's signal handler is called.
fn raise_and_look() {
    let before = COUNT.load(Ordering::Relaxed);
    // SAFETY: the handler counts.
    unsafe { libc::raise(libc::SIGUSR1) };
    assert_eq!(COUNT.load(Ordering::Relaxed), before + 1);
}

/// Runs the scenario with failures from the first call of each number in each step on, and from the last.
fn everywhere(failures: usize, with_last: bool) {
    let places = Shared { calls: shared(), holdings: shared() };
    let calls = places.calls;
    let expected = run(&places, 0, 0).expect("it works where nothing fails");
    let count = calls.count.load(Ordering::Relaxed);
    assert!(count < MOST, "{count} calls are more than the record has room for");
    let mut kinds: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (index, (step, call)) in calls.record[..count].iter().enumerate() {
        kinds.entry((step.load(Ordering::Relaxed), call.load(Ordering::Relaxed))).or_default().push(index);
    }
    let number_of_kinds = kinds.len();
    let mut runs = 0;
    for ((step, call), indices) in kinds {
        let last = indices.last().copied().filter(|_| with_last && indices.len() > 1);
        for index in indices.into_iter().take(1).chain(last) {
            runs += 1;
            let found = run(&places, index, failures);
            println!("call {index}, number {call} in step {step}: {found:?}");
            assert_eq!(found, Some(expected), "{failures} failures from call {index} on, number {call} in step {step}");
        }
    }
    println!(
        "figure: {count} system calls of {number_of_kinds} kinds; {failures} fail in a row, from {runs} places on"
    );
}

fn one_call_fails() {
    everywhere(1, true);
}

fn calls_fail_for_a_while() {
    everywhere(25, false);
}
