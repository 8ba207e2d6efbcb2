//! The costs of calls, in instructions.
//!
//! With `-icount shift=0,sleep=off` QEMU's time-stamp counter counts instructions, including the kernel's. Another test
//! single-steps a call. It counts only the program's instructions, and looks for WRPKRU.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::arch::x86_64::_rdtsc;
use std::hint::black_box;

use pkru::domain::default_rights;
use pkru::gate::{Context, Exit, Gate};
use pkru_userspace::{Domain, HeapChecks, ProtectionKey};
use support::{build, domain, suite};

suite! {
    #[counts_instructions] an_empty_call,
    #[counts_instructions] a_rewind,
    #[counts_instructions] a_violation_costs_less_to_log_than_to_rewind,
    #[counts_instructions] malloc_and_free_in_a_domain,
    #[counts_instructions] a_check_costs_what_was_touched,
    #[counts_instructions] steps_of_the_heap_are_bounded,
    #[counts_instructions] the_bare_gate,
    #[counts_instructions] a_call_costs_the_same_with_a_thousand_domains,
    #[counts_instructions] a_discard_costs_what_was_touched,
    #[counts_instructions] a_service,
    an_empty_call_by_single_steps,
}

/// The difference between two consecutive readings of the counter.
const READING: u64 = 4;

/// Returns the fewest instructions that a function takes in 200 runs.
fn count(mut function: impl FnMut()) -> u64 {
    (0..200).map(|_| count_once(&mut function)).min().unwrap_or(0)
}

/// Returns the instructions that one run of a function takes.
fn count_once(function: impl FnOnce()) -> u64 {
    // SAFETY: every x86-64 CPU has the instruction.
    let before = unsafe { _rdtsc() };
    function();
    // SAFETY: as above.
    let after = unsafe { _rdtsc() };
    (after - before).saturating_sub(READING)
}

/// Prints a figure. Fails if it is above the limit. Unoptimised code has no fixed cost.
fn report(what: &str, figure: u64, limit: u64) {
    println!("figure: {what}: {figure} instructions (at most {limit})");
    assert!(figure <= limit || cfg!(debug_assertions), "{what}: {figure} instructions, more than {limit}");
}

fn a_violation_costs_less_to_log_than_to_rewind() {
    let mut domain = domain("logged");
    let targets = [0u64; 64];
    // Once with the same violation each time, and once with a different one each time.
    for (what, others) in [("again", 1), ("at another address", targets.len())] {
        let (mut rewind, mut text) = (u64::MAX, u64::MAX);
        for number in 0..200 {
            let target = (&raw const targets[(number + 1) % others]).cast_mut();
            let mut result = Ok(());
            // SAFETY: deliberately unsound: the mistake under test.
            let once = || result = domain.call(|| unsafe { target.write_volatile(1) });
            rewind = rewind.min(count_once(once));
            let violation = result.unwrap_err();
            text = text.min(count_once(|| drop(black_box(violation.to_string()))));
            domain.call(|| ()).unwrap();
        }
        println!("figure: a violation {what}: {rewind} instructions to its Err, {text} to its text");
        assert!(text < rewind || cfg!(debug_assertions), "logging costs more than the rewind");
    }
}

fn an_empty_call() {
    for (checks, _) in LEVELS {
        let mut domain = build(Domain::builder("empty").heap_checks(checks));
        let figure = count(|| domain.call(|| ()).unwrap());
        report("an empty Domain::call", figure, 146);
        assert!(figure <= 146 || cfg!(debug_assertions), "a call that touches nothing of the heap hardly pays for it");
    }
}

fn a_rewind() {
    let mut domain = domain("rewind");
    let target = Box::new(0u64);
    let address = &raw const *target as u64;
    let mut fewest = u64::MAX;
    let mut whole = u64::MAX;
    for _ in 0..200 {
        // SAFETY: every x86-64 CPU has the instruction.
        let before = unsafe { _rdtsc() };
        domain.call(|| ()).unwrap();
        // SAFETY: as above.
        let ready = unsafe { _rdtsc() };
        // SAFETY: deliberately unsound: the mistake under test.
        drop(domain.call(|| unsafe { (black_box(address) as *mut u64).write_volatile(1) }).unwrap_err());
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        fewest = fewest.min(after - ready);
        whole = whole.min(after - before);
    }
    report("a call that faults, to its Err", fewest - READING, 5350);
    println!("figure: the same with the call before it, which discards the old memory: {whole} instructions");
    assert_eq!(*target, 0);
}

const LEVELS: [(HeapChecks, &str); 2] = [(HeapChecks::Fast, "fast"), (HeapChecks::Full, "full")];

fn malloc_and_free_in_a_domain() {
    for ((checks, name), goal) in LEVELS.into_iter().zip([120, 180]) {
        let mut domain = build(Domain::builder("malloc").heap_checks(checks));
        let figure = domain.call(|| {
            count(|| {
                // SAFETY: the block is freed once.
                unsafe { libc::free(black_box(libc::malloc(black_box(64)))) };
            })
        });
        let figure = figure.unwrap();
        println!(
            "figure: malloc and free of 64 bytes in a domain, {name} checks: {figure} instructions (at most {goal})"
        );
        assert!(figure <= goal || cfg!(debug_assertions));
    }
}

fn a_check_costs_what_was_touched() {
    for (checks, name) in LEVELS {
        let mut domain = build(Domain::builder("check").heap_checks(checks));
        let mut cost = |pairs: usize| {
            let once = |domain: &mut Domain| {
                domain.call(|| {
                    // SAFETY: each block is freed once.
                    (0..pairs).for_each(|_| unsafe { libc::free(black_box(libc::malloc(black_box(64)))) });
                })
            };
            count(|| once(&mut domain).unwrap())
        };
        let [none, one, ten, thousand] = [0, 1, 10, 1000].map(&mut cost);
        println!(
            "figure: a call that allocates and frees 64 bytes with {name} checks, {none} instructions without: {one} once, \
             {ten} ten times, {thousand} a thousand times"
        );
        if checks == HeapChecks::Fast {
            // Some of a thousand wait for the next generation of freed blocks.
            let most = 1000 * 130 + 128 * 40;
            assert!(thousand < most || cfg!(debug_assertions), "a bounded number of blocks is checked");
        }
    }
}

/// Numbers from a linear congruential generator.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// Replaces one of so many live blocks of up to `most` bytes in each step. Returns the instructions of a step.
fn churn(live: usize, most: usize) -> u64 {
    let mut numbers = Numbers(1);
    // SAFETY: malloc takes any size.
    let new = |numbers: &mut Numbers| unsafe { libc::malloc(numbers.below(most) + 1) };
    let mut blocks: Vec<_> = (0..live).map(|_| new(&mut numbers)).collect();
    let mut steps = |steps: usize| {
        count_once(|| {
            for _ in 0..steps {
                let index = numbers.below(live);
                // SAFETY: the block is replaced.
                unsafe { libc::free(blocks[index]) };
                blocks[index] = new(&mut numbers);
            }
        }) / steps as u64
    };
    // At first new memory costs page faults.
    steps(5 * live);
    let cost = (0..5).map(|_| steps(1000)).min().unwrap_or(0);
    // SAFETY: each block is freed once.
    blocks.into_iter().for_each(|block| unsafe { libc::free(block) });
    cost
}

/// Allocates and frees 8 KiB in each step, with so many holes that are too small.
fn holes(holes: usize) -> u64 {
    // SAFETY: malloc takes any size.
    let blocks: Vec<_> = (0..2 * holes).map(|_| unsafe { libc::malloc(2000) }).collect();
    // SAFETY: each block is freed once.
    blocks.iter().step_by(2).for_each(|block| unsafe { libc::free(*block) });
    let pair = || {
        // SAFETY: the block is freed once.
        (0..100).for_each(|_| unsafe { libc::free(black_box(libc::malloc(black_box(8192)))) });
    };
    let cost = (0..5).map(|_| count_once(pair)).min().unwrap_or(0) / 100;
    // SAFETY: each block is freed once.
    blocks.iter().skip(1).step_by(2).for_each(|block| unsafe { libc::free(*block) });
    cost
}

/// Grows two blocks in turn, each step by an eighth.
fn growth(most: usize) -> u64 {
    let grow = || {
        let mut blocks = [std::ptr::null_mut(); 2];
        let (mut size, mut steps) = (64, 0);
        while size < most {
            for block in &mut blocks {
                // SAFETY: the block is replaced.
                *block = unsafe { libc::realloc(*block, size) };
                steps += 1;
            }
            size += size / 8;
        }
        // SAFETY: each block is freed once.
        blocks.into_iter().for_each(|block| unsafe { libc::free(block) });
        steps
    };
    (0..5)
        .map(|_| {
            let mut steps = 0;
            count_once(|| steps = grow()) / steps
        })
        .min()
        .unwrap_or(0)
}

fn steps_of_the_heap_are_bounded() {
    /// A pattern with little and with ten times as much, and the most instructions of a step with much.
    type Pattern = (&'static str, fn() -> u64, fn() -> u64, u64);
    // Where blocks are large, a step includes page faults.
    let patterns: [Pattern; 4] = [
        ("churn of blocks to 4 KiB, 1,000 of them", || churn(100, 4096), || churn(1000, 4096), 1500),
        ("churn of blocks to 64 KiB, 1,000 of them", || churn(100, 65_536), || churn(1000, 65_536), 5000),
        ("8 KiB with 1,000 holes", || holes(100), || holes(1000), 750),
        ("realloc growth to 64 KiB", || growth(6400), || growth(65_536), 3000),
    ];
    for (what, little, much, most) in patterns {
        let (_, glibc) = (little(), much());
        for (checks, name) in LEVELS {
            let builder = Domain::builder("heap").heap_size(256 << 20).heap_checks(checks);
            // The fewest of three: the kernel has other work too while it hands out pages.
            let runs = (0..3).map(|_| build(builder.clone()).call(|| (little(), much())).unwrap());
            let (few, many) = runs.fold((u64::MAX, u64::MAX), |least, run| (least.0.min(run.0), least.1.min(run.1)));
            println!("figure: {what}, {name} checks: {many} instructions a step; {few} with a tenth; glibc {glibc}");
            if checks == HeapChecks::Fast {
                assert!(many <= most || cfg!(debug_assertions), "{what}: {many} instructions a step, more than {most}");
            }
        }
    }
}

fn the_bare_gate() {
    // Making a domain prepares the thread.
    let domain = domain("ready");
    // SAFETY: the call touches no memory.
    let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) };
    let key = ProtectionKey::new(key as u8).expect("the kernel has another key");
    let (size, access) = (64 * 1024, libc::PROT_READ | libc::PROT_WRITE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping touches nothing that exists.
    let stack = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0) };
    // SAFETY: the pages belong to the test.
    assert_eq!(unsafe { libc::syscall(libc::SYS_pkey_mprotect, stack, size, access, i32::from(key.number())) }, 0);
    // SAFETY: the domain was built, so the CPU has FSGSBASE.
    let fs_base = unsafe { pkru::instructions::rdfsbase() };
    let mut context = Context::new(key, default_rights(key), (stack as usize + size) as u64, fs_base);
    unsafe extern "C" fn same(argument: u64) -> u64 {
        argument
    }
    let once = |context: &mut Context| {
        // SAFETY: every x86-64 CPU has the instruction.
        let before = unsafe { _rdtsc() };
        // SAFETY: the stack is mapped and tagged, nothing else uses the key, and `same` does not trap.
        let exit = unsafe { Gate::Pkru.enter(context, same, 7) };
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        assert_eq!(exit, Exit::Returned(7));
        after - before - READING
    };
    let figure = (0..200).map(|_| once(&mut context)).min().unwrap_or(0);
    drop(domain);
    report("the bare gate, in and out", figure, 79);
}

fn a_call_costs_the_same_with_a_thousand_domains() {
    let mut domain = domain("one");
    /// Not inlined, so that both figures measure the same code.
    #[inline(never)]
    fn empty(domain: &mut Domain) -> u64 {
        // The first call may have to get a key.
        domain.call(|| ()).unwrap();
        count(|| domain.call(|| ()).unwrap())
    }
    let alone = empty(&mut domain);
    let small = || Domain::builder("another").stack_size(16 * 1024).heap_size(64 * 1024).build().unwrap();
    let others: Vec<_> = (1..1000).map(|_| small()).collect();
    let among_many = empty(&mut domain);
    println!("figure: an empty Domain::call among {} domains: {among_many} instructions", others.len() + 1);
    assert_eq!(among_many, alone);
}

fn a_discard_costs_what_was_touched() {
    let cost = |heap: usize, pages: usize| {
        let mut domain = Domain::builder("discard").heap_size(heap).build().unwrap();
        let once = || {
            let touch = || {
                let block = black_box(Vec::leak(vec![black_box(1u8); pages * 4096]));
                block.len() as u64
            };
            domain.call(touch).unwrap();
            // SAFETY: every x86-64 CPU has the instruction.
            let before = unsafe { _rdtsc() };
            domain.discard();
            // SAFETY: as above.
            unsafe { _rdtsc() - before }
        };
        std::iter::repeat_with(once).take(20).min().unwrap_or(0)
    };
    drop(domain("first"));
    let (small, large) = (cost(1 << 20, 1), cost(512 << 20, 1));
    let (some, many) = (cost(64 << 20, 100), cost(64 << 20, 1000));
    println!(
        "figure: a discard after one page was touched: {small} instructions with a heap of 1 MiB, {large} with 512 MiB"
    );
    println!("figure: a discard after 100 pages were touched: {some} instructions; after 1,000: {many}");
    // The kernel visits one page table entry per 2 MiB of addresses, which is about 25 instructions per MiB.
    assert!(large < small + 512 * 50, "the cost hardly depends on the size of the heap");
    assert!(many > some && many < some * 20, "the cost depends on the touched pages");
}

fn a_service() {
    let change = || {
        let mut pages = [0u8; 3 * 4096];
        let page = pages.as_mut_ptr().map_addr(|address| address.next_multiple_of(4096));
        count(|| {
            // SAFETY: the page is this function's own, and has this protection.
            unsafe { libc::mprotect(page.cast(), 4096, libc::PROT_READ | libc::PROT_WRITE) };
        })
    };
    let descriptors = || {
        count(|| {
            // SAFETY: the descriptor is this function's own.
            unsafe { libc::close(libc::dup(0)) };
        })
    };
    let mut domain = domain("services");
    let protect = [change(), domain.call(change).unwrap()];
    let close = [descriptors(), domain.call(descriptors).unwrap()];
    println!("figure: mprotect of a page: {} instructions outside domains, {} in one", protect[0], protect[1]);
    println!("figure: dup and close: {} instructions outside domains, {} in one", close[0], close[1]);
    assert!(protect[1] < 20_000 && close[1] < 20_000);
}

fn an_empty_call_by_single_steps() {
    /// WRPKRU.
    const WRPKRU: u64 = 0x00ef_010f;
    let mut domain = domain("steps");
    domain.call(|| ()).unwrap();
    let (all, wrpkru) = steps(&mut domain, WRPKRU);
    println!("figure: an empty Domain::call: {all} instructions by single steps, {wrpkru} of them WRPKRU");
    assert_eq!(wrpkru, 2);
    // Unoptimised code has no fixed cost.
    assert!(all <= 300 || cfg!(debug_assertions));
}

/// Marks the beginning and the end of the counted code.
#[unsafe(naked)]
extern "C" fn marker() {
    std::arch::naked_asm!("nop", "ret")
}

fn in_marker(instruction: u64) -> bool {
    (0..2).contains(&instruction.wrapping_sub(marker as *const () as usize as u64))
}

/// Single-steps an empty call in a child. Returns the number of instructions between two calls of `marker`, and how
/// many of them begin with these three bytes.
fn steps(domain: &mut Domain, bytes: u64) -> (u64, u64) {
    // SAFETY: the child makes system calls and the counted call, and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the calls touch no memory. The parent traces this process from here on.
        unsafe {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
        }
        marker();
        let result = domain.call(|| ());
        marker();
        // SAFETY: `_exit` runs none of the parent's exit handlers.
        unsafe { libc::_exit(i32::from(result.is_err())) };
    }
    let wait = || {
        let mut status = 0;
        // SAFETY: the status is writable.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        status
    };
    wait();
    let (mut markers, mut all, mut found) = (0, 0, 0);
    while markers < 2 {
        // SAFETY: the child is stopped and traced by this process.
        unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) };
        let status = wait();
        assert!(libc::WIFSTOPPED(status), "the child ended before the second marker: {status:#x}");
        // SAFETY: this is a C struct of integers, for which zero is valid.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        // SAFETY: the struct is writable.
        unsafe { libc::ptrace(libc::PTRACE_GETREGS, child, 0, &raw mut registers) };
        if registers.rip == marker as *const () as usize as u64 {
            markers += 1;
        }
        if markers == 1 && !in_marker(registers.rip) {
            // SAFETY: the child's next instruction is mapped.
            let word = unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, child, registers.rip, 0) } as u64;
            all += 1;
            found += u64::from(word & 0x00ff_ffff == bytes);
        }
    }
    // SAFETY: the call touches no memory.
    unsafe { libc::kill(child, libc::SIGKILL) };
    wait();
    (all, found)
}
