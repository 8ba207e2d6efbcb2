//! Results of calls. A forged result is refused, and receiving it reads and frees nothing outside the domain. Results
//! do not fill the domain's heap.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::cell::RefCell;
use std::hint::black_box;

use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
use pkru_userspace::{Domain, ViolationKind};
use support::{build, domain, suite, works};

suite! {
    values_cross,
    a_vector_outside_the_domain,
    a_length_past_the_end,
    text_that_is_not_utf8,
    parts_that_overlap,
    a_wire_that_is_sent_again_frees_nothing,
    lent_blocks_are_freed,
    nesting_stays_within_the_callers_stack,
    large_parts_stay_within_the_callers_stack,
    nesting_on_a_stack_of_the_programs_own,
    results_of_many_calls_do_not_fill_the_heap,
    empty_results_with_room_do_not_fill_the_heap,
    a_result_that_lies_on_the_stack_is_not_freed,
    a_result_for_which_the_caller_has_no_memory,
    callback_data_for_which_the_caller_has_no_memory,
}

fn values_cross() {
    let mut domain = domain("values");
    assert_eq!(domain.call(|| ()).unwrap(), ());
    assert_eq!(domain.call(|| (1u8, -2i64, 'ß', true)).unwrap(), (1, -2, 'ß', true));
    assert_eq!(domain.call(|| Some(vec![String::from("a"), String::new()])).unwrap().unwrap(), ["a", ""]);
    assert_eq!(
        domain.call(|| "seven".parse::<u32>().map_err(|error| error.to_string())).unwrap().unwrap_err(),
        "invalid digit found in string"
    );
    assert_eq!(domain.call(|| [[1u16; 3]; 2]).unwrap(), [[1; 3]; 2]);
    assert_eq!(domain.call(Vec::<u64>::new).unwrap(), []);
    assert_eq!(domain.call(|| vec![7u64; 1 << 16]).unwrap().len(), 1 << 16);
}

fn refused<R: Transfer + std::fmt::Debug>(domain: &mut Domain, forge: impl Fn() -> R) -> InvalidResult {
    let violation = domain.call(forge).unwrap_err();
    works(domain);
    match violation.kind() {
        ViolationKind::InvalidResult(invalid) => *invalid,
        other => panic!("{other:?}"),
    }
}

fn a_vector_outside_the_domain() {
    let mut domain = domain("liar");
    let secret = vec![0x42_u8; 64];
    let address = secret.as_ptr().cast_mut();
    // SAFETY: deliberately unsound: the vector's memory is not in the domain.
    let invalid = refused(&mut domain, || unsafe { Vec::from_raw_parts(address, 64, 64) });
    assert_eq!(invalid, InvalidResult::OutOfBounds { address: address as u64, length: 64 });
    assert_eq!(secret, [0x42; 64], "the block was not freed");
}

fn a_length_past_the_end() {
    let mut domain = domain("liar");
    // SAFETY: deliberately unsound: the length is wrong.
    let invalid = refused(&mut domain, || unsafe {
        let block = Vec::leak(vec![0u8; 16]).as_mut_ptr();
        Vec::from_raw_parts(block, 1 << 40, 1 << 40)
    });
    assert!(matches!(invalid, InvalidResult::OutOfBounds { .. } | InvalidResult::TooLarge), "{invalid:?}");
}

fn text_that_is_not_utf8() {
    let mut domain = domain("liar");
    // SAFETY: deliberately unsound: the bytes are not UTF-8.
    let invalid = refused(&mut domain, || unsafe { String::from_utf8_unchecked(vec![0xff, 0xfe]) });
    assert_eq!(invalid, InvalidResult::NotUtf8);
}

fn parts_that_overlap() {
    let mut domain = domain("liar");
    let invalid = refused(&mut domain, || {
        let block = Vec::leak(vec![0u64; 1 << 20]).as_mut_ptr();
        // SAFETY: deliberately unsound: all of them are the same block.
        (0..1000).map(|_| unsafe { Vec::from_raw_parts(block, 1 << 20, 1 << 20) }).collect::<Vec<_>>()
    });
    assert_eq!(invalid, InvalidResult::TooLarge);
}

type Bytes = <Vec<u8> as Transfer>::Wire;

/// Keeps the wire of a byte vector, to send it again.
struct Kept(Bytes);

impl Transfer for Kept {
    type Wire = Bytes;

    fn into_wire(self) -> Bytes {
        self.0
    }

    fn from_wire(wire: &Bytes, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        // Receiving a wire twice is allowed too.
        Vec::<u8>::from_wire(wire, memory)?;
        Vec::<u8>::from_wire(wire, memory)?;
        Ok(Self(*wire))
    }
}

fn a_wire_that_is_sent_again_frees_nothing() {
    const WORDS: [&str; 4] = ["one", "two", "three", "four"];
    thread_local! { static WORDS_IN_DOMAIN: RefCell<Option<Box<[&'static str; 4]>>> = const { RefCell::new(None) }; }
    let mut domain = domain("again");
    let Kept(wire) = domain.call(|| Kept(vec![0u8; size_of_val(&WORDS)].into_wire())).unwrap();
    let at = wire_address(&mut domain, wire);
    let place = domain
        .call(|| {
            // The heap holds freed blocks back for a while.
            let mut boxes = std::iter::repeat_with(|| black_box(Box::new(WORDS))).take(100);
            WORDS_IN_DOMAIN.set(boxes.find(|words| words.as_ptr().addr() == at));
            WORDS_IN_DOMAIN.with_borrow(|words| words.as_ref().map(|words| words.as_ptr().addr()))
        })
        .unwrap();
    assert_eq!(place, Some(at), "control: the box lies where the bytes were");
    domain.call(|| Kept(wire)).unwrap();
    let words = domain.call(|| {
        let other = black_box(vec![0usize; 8]);
        let words = WORDS_IN_DOMAIN.with_borrow(|words| words.as_ref().map(|words| words.map(String::from)));
        drop(other);
        words
    });
    assert_eq!(words.unwrap(), Some(WORDS.map(String::from)));
}

/// Returns the address in a wire, parsed from its `Debug` output.
fn wire_address(domain: &mut Domain, wire: Bytes) -> usize {
    works(domain);
    let text = format!("{wire:?}");
    let digits = text.split("address: ").nth(1).unwrap().split(',').next().unwrap();
    digits.parse().unwrap()
}

fn lent_blocks_are_freed() {
    let mut domain = build(Domain::builder("small").heap_size(1 << 20));
    // 16 times the size of the heap. `from_wire` ignores half of it.
    struct Ignored;
    impl Transfer for Ignored {
        type Wire = Bytes;
        fn into_wire(self) -> Bytes {
            vec![2u8; 1 << 16].into_wire()
        }
        fn from_wire(_: &Bytes, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
            Ok(Self)
        }
    }
    for _ in 0..128 {
        assert_eq!(domain.call(|| vec![1u8; 1 << 16]).unwrap().len(), 1 << 16);
        domain.call(|| Ignored).unwrap();
    }
}

/// A value in which vectors nest, with data of this size at each level.
struct Node<const N: usize>([u8; N], Vec<Self>);

/// The wire of a vector of nodes.
struct Nodes(Bytes);

impl Transfer for Nodes {
    type Wire = Bytes;
    fn into_wire(self) -> Bytes {
        self.0
    }
    fn from_wire(wire: &Bytes, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Ok(Self(*wire))
    }
}

impl<const N: usize> Transfer for Node<N> {
    type Wire = <([u8; N], Nodes) as Transfer>::Wire;
    fn into_wire(self) -> Self::Wire {
        (self.0, Nodes(self.1.into_wire())).into_wire()
    }
    fn from_wire(wire: &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        let (data, Nodes(nodes)) = Transfer::from_wire(wire, memory)?;
        Ok(Self(data, Transfer::from_wire(&nodes, memory)?))
    }
}

/// Receives vectors that nest so deep, and returns how deep they do.
fn nest<const N: usize>(domain: &mut Domain, depth: usize) -> Result<usize, ViolationKind> {
    let result = domain.call(|| (0..depth).fold(Vec::new(), |nodes, _| vec![Node([7; N], nodes)]));
    let deepest = result.map_err(|violation| violation.kind().clone())?;
    let (mut nodes, mut found) = (&deepest, 0);
    while let Some(Node(data, inner)) = nodes.first() {
        assert!(data.iter().all(|byte| *byte == 7));
        (nodes, found) = (inner, found + 1);
    }
    Ok(found)
}

/// Runs a function on a thread with a stack of this size, in KiB.
fn with_stack<R: Send>(size: usize, function: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(size << 10);
        thread.spawn_scoped(scope, function).unwrap().join().unwrap()
    })
}

const TOO_DEEP: Result<usize, ViolationKind> = Err(ViolationKind::InvalidResult(InvalidResult::TooDeep));

fn nesting_stays_within_the_callers_stack() {
    let mut domain = build(Domain::builder("deep").stack_size(32 << 20).heap_size(256 << 20));
    let domain = &mut domain;
    assert_eq!(with_stack(2048, || nest::<16>(domain, 120)), Ok(120));
    assert_eq!(with_stack(2048, || nest::<16>(domain, 140)), TOO_DEEP);
    assert_eq!(with_stack(8192, || nest::<3000>(domain, 8)), Ok(8));
    assert_eq!(with_stack(32768, || nest::<3000>(domain, 120)), Ok(120));
    assert_eq!(with_stack(128, || nest::<16>(domain, 8)), Ok(8));
    assert_eq!(with_stack(128, || nest::<3000>(domain, 120)), TOO_DEEP);
    assert_eq!(with_stack(128, || nest::<{ 256 << 10 }>(domain, 1)), TOO_DEEP);
    assert_eq!(with_stack(32768, || nest::<{ 256 << 10 }>(domain, 8)), Ok(8));
    // Whatever the sizes, the program goes on.
    for size in [64, 96, 128, 256, 512, 1024, 2048, 8192] {
        for depth in [1, 4, 8, 16, 64, 128] {
            let results = with_stack(size, || {
                [nest::<16>(domain, depth), nest::<200>(domain, depth), nest::<3000>(domain, depth)]
            });
            for result in results {
                assert!(result == Ok(depth) || result == TOO_DEEP, "{size} KiB, {depth} levels: {result:?}");
            }
        }
        // More would overflow the domain's stack.
        for depth in 1..=8 {
            let result = with_stack(size, || nest::<{ 256 << 10 }>(domain, depth));
            assert!(result == Ok(depth) || result == TOO_DEEP, "{size} KiB, {depth} levels: {result:?}");
        }
    }
}

fn large_parts_stay_within_the_callers_stack() {
    const SIZE: usize = 1 << 20;
    fn check<R: Transfer>(domain: &mut Domain, receive: impl Fn() -> Vec<R> + Sync) {
        for (size, has_room) in [(256, false), (1024, false), (64 << 10, true)] {
            let result = with_stack(size, || domain.call(&receive).map(|values| black_box(values).len()));
            let expected = if has_room { Ok(1) } else { TOO_DEEP };
            assert_eq!(result.map_err(|violation| violation.kind().clone()), expected, "{size} KiB");
        }
    }
    let mut domain = build(Domain::builder("large").stack_size(64 << 20).heap_size(256 << 20));
    check(&mut domain, || vec![[7u8; SIZE]]);
    check(&mut domain, || vec![[true; SIZE]]);
    check(&mut domain, || vec![Box::new([true; SIZE])]);
    check(&mut domain, || vec![Large([7; SIZE])]);
    check(&mut domain, || vec![Some((1u8, Box::new(Large([7; SIZE]))))]);
}

/// What is known about a thread's stack says nothing about a stack that the program has made.
fn nesting_on_a_stack_of_the_programs_own() {
    const SIZE: usize = 96 << 10;
    struct Place {
        domain: Domain,
        results: Vec<Result<usize, ViolationKind>>,
    }
    extern "C" fn receive(high: u32, low: u32) {
        let place = (u64::from(high) << 32 | u64::from(low)) as *mut Place;
        // SAFETY: the test passes the two halves of an address, and waits.
        let Place { domain, results } = unsafe { &mut *place };
        for (small, depth) in [(true, 1), (true, 120), (false, 2), (false, 120)] {
            results.push(if small { nest::<16>(domain, depth) } else { nest::<3000>(domain, depth) });
        }
    }
    let mut place = Place { domain: build(Domain::builder("deep").stack_size(16 << 20)), results: Vec::new() };
    let address = (&raw mut place) as u64;
    // SAFETY: `receive` takes two integers of 32 bits, its stack lives until it has returned, and the contexts are
    // initialised before they are used.
    unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let guarded = libc::mmap(std::ptr::null_mut(), SIZE + 4096, access, flags, -1, 0);
        assert_eq!(libc::mprotect(guarded, 4096, libc::PROT_NONE), 0);
        let (mut here, mut there) = (std::mem::zeroed::<libc::ucontext_t>(), std::mem::zeroed::<libc::ucontext_t>());
        assert_eq!(libc::getcontext(&raw mut there), 0);
        there.uc_stack.ss_sp = guarded.byte_add(4096);
        there.uc_stack.ss_size = SIZE;
        there.uc_link = &raw mut here;
        let function = std::mem::transmute::<extern "C" fn(u32, u32), extern "C" fn()>(receive);
        libc::makecontext(&raw mut there, function, 2, (address >> 32) as u32, address as u32);
        assert_eq!(libc::swapcontext(&raw mut here, &raw const there), 0);
    }
    assert_eq!(place.results[..2], [Ok(1), TOO_DEEP]);
    assert_eq!(place.results[3], TOO_DEEP);
    works(&mut place.domain);
}

fn results_of_many_calls_do_not_fill_the_heap() {
    let mut domain = build(Domain::builder("results").heap_size(1 << 20));
    for round in 0..200 {
        let result = domain.call(|| vec![round as u8; 100_000]).unwrap();
        assert!(result.len() == 100_000 && result.iter().all(|byte| *byte == round as u8));
    }
}

fn empty_results_with_room_do_not_fill_the_heap() {
    let mut domain = build(Domain::builder("capacity").heap_size(1 << 20));
    for _ in 0..200 {
        assert!(domain.call(|| Vec::<u8>::with_capacity(100_000)).unwrap().is_empty());
    }
}

fn a_result_that_lies_on_the_stack_is_not_freed() {
    let mut domain = domain("stack");
    let forge = || {
        let bytes = std::mem::ManuallyDrop::new([7u8; 32]);
        // SAFETY: deliberately unsound: the vector's memory is not a heap block.
        unsafe { Vec::from_raw_parts(black_box(bytes.as_ptr().cast_mut()), 32, 32) }
    };
    assert_eq!(domain.call(forge).unwrap().len(), 32);
    works(&mut domain);
}

/// Runs a function with a limit to how much memory this process can still map.
fn with_little_memory<R>(more: usize, function: impl FnOnce() -> R) -> R {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    let now = status.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 4096;
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is writable.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut before) }, 0);
    let set = |limit: libc::rlimit| {
        // SAFETY: the limit is readable.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
    };
    set(libc::rlimit { rlim_cur: now + more as u64, ..before });
    let result = function();
    set(before);
    result
}

/// A value that takes much more than its wire.
#[derive(Debug)]
struct Large<const SIZE: usize>([u8; SIZE]);

impl<const SIZE: usize> Transfer for Large<SIZE> {
    type Wire = u8;

    fn into_wire(self) -> u8 {
        self.0[0]
    }

    fn from_wire(wire: &u8, _: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        Ok(Self([*wire; SIZE]))
    }
}

fn a_result_for_which_the_caller_has_no_memory() {
    thread_local! { static CALLS: std::cell::Cell<u32> = const { std::cell::Cell::new(0) } }
    const MIB: usize = 1 << 20;
    const SIZE: usize = 64 << 10;
    #[track_caller]
    fn check<R: Transfer>(domain: &mut Domain, make: impl Fn() -> R) {
        let make = || {
            CALLS.set(CALLS.get() + 1);
            make()
        };
        drop(black_box(domain.call(make).unwrap()));
        assert_eq!(domain.call(|| CALLS.get()).unwrap(), 1);
        let result = with_little_memory(16 * MIB, || black_box(domain.call(make)).map(drop));
        let violation = result.unwrap_err();
        assert_eq!(*violation.kind(), ViolationKind::InvalidResult(InvalidResult::NoMemory));
        assert_eq!(domain.call(|| CALLS.get()).unwrap(), 0, "the domain was discarded");
        works(domain);
    }
    // What was freed before must not serve. What glibc has reserved for a thread's heap, 64 MiB, still does.
    // SAFETY: the function has no requirements.
    assert_eq!(unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, SIZE as i32 / 2) }, 1);
    let mut domain = build(Domain::builder("large").heap_size(256 * MIB));
    check(&mut domain, || vec![1u8; 64 * MIB]);
    check(&mut domain, || "x".repeat(64 * MIB));
    check(&mut domain, || (0..128).map(|_| vec![1u8; MIB]).collect::<Vec<_>>());
    check(&mut domain, || (0..2000).map(|_| Large([1; SIZE])).collect::<Vec<_>>());
    check(&mut domain, || (0..2000).map(|_| Box::new(Large([1; SIZE]))).collect::<Vec<_>>());
    check(&mut domain, || vec![Some(vec![[true; 96]; MIB])]);
}

fn callback_data_for_which_the_caller_has_no_memory() {
    const SIZE: usize = 64 << 20;
    let mut domain = build(Domain::builder("large").heap_size(4 * SIZE));
    let mut seen = Vec::new();
    let mut read = |arguments: &mut pkru_userspace::CallbackArguments<'_>| {
        let address = arguments.word(0);
        seen.push(arguments.read(address, SIZE).map(|bytes| bytes.len()));
        seen.push(with_little_memory(SIZE / 4, || arguments.read(address, SIZE)).map(|bytes| bytes.len()));
        3
    };
    let result = domain.call_with(&mut [&mut read], |callbacks| {
        let bytes = vec![1u8; SIZE];
        // SAFETY: a callback takes up to six words and returns one.
        let ask: extern "C" fn(usize) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
        ask(bytes.as_ptr().addr())
    });
    assert_eq!((result.unwrap(), seen), (3, vec![Ok(SIZE), Err(InvalidResult::NoMemory)]));
}
