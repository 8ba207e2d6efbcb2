//! What a discard erases, and the memory that it frees.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::hint::black_box;

use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
use pkru_userspace::{Domain, Error, Region, ViolationKind};
use support::{build, contain, domain, mistake, suite, works};

suite! {
    discard_gives_memory_back,
    nothing_of_the_old_contents_can_be_read,
    a_transient_domain_is_clean_at_each_call,
    a_transient_domain_whose_result_is_not_received,
    a_shortage_of_memory_costs_no_keys,
    a_violation_says_so_when_the_domain_cannot_be_made_ready,
}

/// Returns the resident set size of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn a_transient_domain_is_clean_at_each_call() {
    let leak = || {
        let block = Vec::leak(vec![0x77u8; 64]);
        block.as_ptr() as usize
    };
    // SAFETY: the address is in the domain's memory, and every byte is a valid `u8`.
    let look = |address: usize| move || unsafe { black_box(address as *const u8).read_volatile() };
    let mut persistent = domain("persistent");
    let address = persistent.call(leak).unwrap();
    assert_eq!(persistent.call(look(address)).unwrap(), 0x77, "control");

    let mut transient = build(Domain::builder("transient").transient());
    for _ in 0..3 {
        let address = transient.call(leak).unwrap();
        assert_eq!(transient.call(look(address)).unwrap(), 0);
    }
    thread_local! { static COUNT: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    let count = || {
        COUNT.set(COUNT.get() + 1);
        COUNT.get()
    };
    assert_eq!([persistent.call(count).unwrap(), persistent.call(count).unwrap()], [1, 2], "control");
    assert_eq!([transient.call(count).unwrap(), transient.call(count).unwrap()], [1, 1]);
    contain(&mut transient, mistake);
    let text = transient.call(|| String::from("results are copied first")).unwrap();
    assert_eq!(text, "results are copied first");
}

fn a_transient_domain_whose_result_is_not_received() {
    struct Unwelcome;
    impl Transfer for Unwelcome {
        type Wire = u8;

        fn into_wire(self) -> u8 {
            0
        }

        fn from_wire(_: &u8, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
            panic!("not received")
        }
    }
    thread_local! { static COUNT: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    let count = || {
        COUNT.set(COUNT.get() + 1);
        Unwelcome
    };
    let mut transient = build(Domain::builder("transient").transient());
    let received = std::panic::AssertUnwindSafe(|| transient.call(count).is_ok());
    std::panic::catch_unwind(received).unwrap_err();
    assert_eq!(transient.call(|| COUNT.get()).unwrap(), 0);
    works(&mut transient);
}

fn a_shortage_of_memory_costs_no_keys() {
    let mut first = domain("first");
    works(&mut first);
    let limit = |bytes| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the struct is readable.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) }, 0);
    };
    for _ in 0..20 {
        // Enough for a domain's bookkeeping, but not for its heap.
        limit((resident() + (8 << 20)) as u64);
        let failed = Domain::builder("too much").heap_size(256 << 20).build().err();
        let region = Region::new(256 << 20).err();
        limit(libc::RLIM_INFINITY);
        assert!(matches!(failed, Some(Error::System { errno: libc::ENOMEM, .. })), "{failed:?}");
        assert!(matches!(region, Some(Error::System { errno: libc::ENOMEM, .. })), "{region:?}");
    }
    works(&mut first);
    let mut domains: Vec<_> = (0..20).map(|_| domain("after")).collect();
    domains.iter_mut().for_each(works);
    assert!(domains.iter().filter(|domain| domain.key().is_some()).count() >= 11, "the keys are still available");
}

fn discard_gives_memory_back() {
    const SIZE: usize = 32 << 20;
    let mut domain = domain("big");
    let before = resident();
    let fill = || {
        let block = black_box(Vec::leak(vec![black_box(1u8); SIZE]));
        block[SIZE - 1]
    };
    domain.call(fill).unwrap();
    assert!(resident() > before + SIZE / 2, "control");
    domain.discard();
    assert!(resident() < before + (1 << 20), "{} bytes more", resident() - before);
    domain.call(fill).unwrap();
    domain.call(mistake).unwrap_err();
    works(&mut domain);
    assert!(resident() < before + (1 << 20), "{} bytes more", resident() - before);
}

fn nothing_of_the_old_contents_can_be_read() {
    const MARK: u64 = 0x5ec2_e75e_c2e7_0001;
    fn scatter(depth: u32) -> u64 {
        let stack = black_box([MARK; 32]);
        Vec::leak(vec![MARK; 100]);
        if depth == 0 { stack[3] } else { scatter(depth - 1) ^ black_box(stack[7]) }
    }
    let mut domain = build(Domain::builder("old").stack_size(64 * 1024).heap_size(256 * 1024));
    let ranges = format!("{domain:?}");
    let range = |part: &str| {
        let text = ranges.split(&format!("{part}: ")).nth(1).unwrap().split([',', ' ']).next().unwrap();
        let (start, end) = text.split_once("..").unwrap();
        let number = |text: &str| usize::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        number(start)..number(end)
    };
    let (stack, heap) = (range("stack"), range("heap"));
    let look = || {
        let count = |range: &std::ops::Range<usize>| {
            // SAFETY: the range is in the domain.
            range.clone().step_by(8).filter(|address| unsafe { *(*address as *const u64) } == black_box(MARK)).count()
        };
        (count(&stack) + count(&heap)) as u64
    };
    domain.call(|| scatter(20)).unwrap();
    assert!(domain.call(look).unwrap() > 100, "control");
    domain.discard();
    // Up to two words are copies that `look` itself has on the stack.
    assert!(domain.call(look).unwrap() <= 2);
}

fn a_violation_says_so_when_the_domain_cannot_be_made_ready() {
    let mut domain = domain("outer");
    // Code in a domain cannot make domains.
    let text = domain.call(|| Domain::builder("inner").build().map(drop).unwrap_err().to_string()).unwrap();
    assert!(text.contains("code in a domain cannot make"), "{text}");
    assert!(!matches!(contain(&mut domain, mistake).kind(), ViolationKind::NotReady(_)));
}
