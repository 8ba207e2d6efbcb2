//! The malloc family in a domain, called from C and from Rust, behaves as the standard requires.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::c_void;
use std::hint::black_box;

use pkru_userspace::Domain;
use support::{build, domain, suite};

suite! {
    blocks_lie_in_the_domain_and_are_aligned,
    products_that_overflow_are_refused,
    calloc_clears_what_was_used_before,
    alignments,
    realloc_keeps_the_contents,
    usable_size_covers_what_was_asked,
    an_exhausted_heap_says_so_in_c,
    c_strings_come_from_the_domains_heap,
    character_classes_work,
    callocs_and_reallocarrays_products,
    a_domains_block_is_not_freed_outside,
}

fn blocks_lie_in_the_domain_and_are_aligned() {
    let mut domain = domain("blocks");
    let heap = format!("{domain:?}");
    let blocks = domain.call(|| {
        [0usize, 1, 24, 64, 1000, 100_000].map(|size| {
            // SAFETY: malloc takes any size.
            unsafe { black_box(libc::malloc(size)) as usize }
        })
    });
    let blocks = blocks.unwrap();
    assert!(blocks.iter().all(|block| *block != 0 && block.is_multiple_of(16)), "{blocks:x?} in {heap}");
    assert!(blocks.windows(2).all(|pair| pair[0] != pair[1]));
    // SAFETY: malloc takes any size.
    let outside = unsafe { libc::malloc(64) };
    assert!(!outside.is_null());
    // SAFETY: the block was allocated above, outside any domain.
    unsafe { libc::free(outside) };
}

fn products_that_overflow_are_refused() {
    let mut domain = domain("overflow");
    let refused = domain.call(|| {
        // SAFETY: the functions take any numbers, and the returned blocks are not used.
        unsafe {
            [
                black_box(libc::calloc(usize::MAX / 2, 3)).is_null(),
                black_box(libc::reallocarray(std::ptr::null_mut(), usize::MAX / 2, 3)).is_null(),
                black_box(libc::malloc(usize::MAX)).is_null(),
                *libc::__errno_location() == libc::ENOMEM,
                !black_box(libc::calloc(3, 5)).is_null(),
            ]
        }
    });
    assert_eq!(refused.unwrap(), [true; 5]);
}

fn calloc_clears_what_was_used_before() {
    let mut domain = domain("zero");
    let sum = domain.call(|| {
        // SAFETY: the blocks have 500 bytes.
        unsafe {
            let dirty = libc::malloc(500).cast::<u8>();
            dirty.write_bytes(0xff, 500);
            libc::free(black_box(dirty).cast());
            let clean = black_box(libc::calloc(5, 100)).cast::<u8>();
            std::slice::from_raw_parts(clean, 500).iter().map(|byte| u64::from(*byte)).sum::<u64>()
        }
    });
    assert_eq!(sum.unwrap(), 0);
}

fn alignments() {
    let mut domain = domain("align");
    let result = domain.call(|| {
        let mut block = std::ptr::null_mut();
        // SAFETY: `block` is writable, and the returned blocks are not used.
        unsafe {
            (
                libc::posix_memalign(&raw mut block, 24, 8),
                libc::posix_memalign(&raw mut block, 4096, 8),
                (block as usize, libc::aligned_alloc(512, 100) as usize, libc::memalign(64, 1) as usize),
            )
        }
    });
    let (bad, good, (a, b, c)) = result.unwrap();
    assert_eq!((bad, good), (libc::EINVAL, 0));
    assert!(a != 0 && a % 4096 == 0 && b != 0 && b % 512 == 0 && c != 0 && c % 64 == 0);
}

fn realloc_keeps_the_contents() {
    let mut domain = domain("grow");
    let kept = domain.call(|| {
        let mut numbers = Vec::new();
        for number in 0..10_000u32 {
            numbers.push(number);
        }
        numbers.shrink_to(10);
        numbers.iter().zip(0..).all(|(number, expected)| *number == expected)
    });
    assert!(kept.unwrap());
}

fn usable_size_covers_what_was_asked() {
    let mut domain = domain("usable");
    let size = || {
        // SAFETY: the block is freed once.
        unsafe {
            let block = libc::malloc(100);
            let size = libc::malloc_usable_size(block);
            libc::free(block);
            size as u64
        }
    };
    assert!(domain.call(size).unwrap() >= 100);
    assert!(size() >= 100, "outside too");
}

fn an_exhausted_heap_says_so_in_c() {
    let mut domain = build(Domain::builder("full").heap_size(1 << 20));
    let blocks = domain.call(|| {
        // SAFETY: malloc takes any size, and the blocks are not used.
        (0..).take_while(|_| !unsafe { black_box(libc::malloc(10_000)) }.is_null()).count() as u64
    });
    assert!((95..105).contains(&blocks.unwrap()));
}

fn c_strings_come_from_the_domains_heap() {
    let mut domain = domain("strdup");
    let length = domain.call(|| {
        // SAFETY: the string is NUL-terminated, and the copy is freed once.
        unsafe {
            let copy = libc::strdup(c"a string".as_ptr());
            let length = libc::strlen(copy);
            libc::free(copy.cast());
            length as u64
        }
    });
    assert_eq!(length.unwrap(), 8);
}

fn character_classes_work() {
    let mut domain = domain("ctype");
    // These functions use tables that the C library initialises for each thread.
    // SAFETY: both functions take any character.
    let upper = domain.call(|| unsafe { (libc::toupper(i32::from(b'p')), libc::isdigit(i32::from(b'7')) != 0) });
    assert_eq!(upper.unwrap(), (i32::from(b'P'), true));
}

fn callocs_and_reallocarrays_products() {
    let mut domain = domain("products");
    let answers = domain.call(|| {
        let half = usize::MAX / 2 + 1;
        // `black_box` keeps the compiler from removing the allocations.
        // SAFETY: the functions take any numbers, and the returned blocks are not used.
        unsafe {
            let block = black_box(libc::malloc(16));
            let results = [
                black_box(libc::calloc(half, 2)).is_null(),
                black_box(libc::reallocarray(block, half, 2)).is_null(),
                !black_box(libc::calloc(0, 0)).is_null(),
                !black_box(libc::malloc(0)).is_null(),
                black_box(libc::malloc(0)) != black_box(libc::malloc(0)),
                black_box(libc::malloc(black_box(usize::MAX))).is_null(),
            ];
            (results, *libc::__errno_location())
        }
    });
    assert_eq!(answers.unwrap(), ([true; 6], libc::ENOMEM));
}

fn a_domains_block_is_not_freed_outside() {
    let mut domain = domain("owner");
    // SAFETY: the block is never used.
    let block = domain.call(|| unsafe { libc::malloc(100) } as u64).unwrap() as *mut c_void;
    for resize in [false, true] {
        let status = support::in_child(|| {
            // SAFETY: deliberately unsound: the mistake under test.
            unsafe {
                if resize {
                    libc::realloc(block, 200) as usize
                } else {
                    libc::free(block);
                    0
                }
            };
        });
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{status:#x}");
    }
    // SAFETY: the block belongs to this domain.
    domain.call(|| unsafe { libc::free(block) }).expect("control");
}
