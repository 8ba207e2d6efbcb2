//! Mistakes with the domain's own heap, in the style of published bugs. Each ends the call that makes it, with both levels
//! of checks. As controls, the same acts go unnoticed outside a domain, or the domain accepts the correct ones.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use std::ffi::c_char;
use std::hint::black_box;

use pkru_userspace::{Corruption, Damage, Domain, HeapChecks, HeapError, Violation, ViolationKind};
use support::{build, contain, suite, works};

suite! {
    a_string_without_room_for_its_end,
    a_loop_that_goes_one_too_far,
    a_line_longer_than_its_buffer,
    a_size_that_overflowed,
    a_trim_that_runs_below_the_start,
    a_write_after_free,
    a_write_through_a_pointer_from_before_a_realloc,
    a_write_beyond_a_block_that_was_shrunk,
    a_double_free_through_two_pointers,
    a_free_of_a_pointer_that_was_advanced,
    a_pointer_that_was_never_initialised,
    an_overflow_long_after_the_allocation,
    an_overflow_of_a_block_of_an_earlier_call,
    an_overflow_before_a_callback,
    an_overflow_of_a_result,
    overwritten_records_of_the_heap,
    a_report_names_the_code_that_freed_or_allocated,
    correct_code_uses_all_of_its_blocks,
}

const LEVELS: [HeapChecks; 2] = [HeapChecks::Fast, HeapChecks::Full];

fn domain(checks: HeapChecks) -> Domain {
    build(Domain::builder("heap").heap_checks(checks))
}

fn malloc(size: usize) -> *mut u8 {
    // SAFETY: malloc takes any size.
    black_box(unsafe { libc::malloc(black_box(size)) }).cast()
}

unsafe fn free(block: *mut u8) {
    // SAFETY: the caller answers for the block.
    unsafe { libc::free(black_box(block).cast()) };
}

/// Makes a mistake in a domain with each level of checks, and outside, where it goes unnoticed.
fn corrupts(mistake: impl Fn()) -> [Corruption; 2] {
    assert_eq!(support::in_child(&mistake), 0, "control: nothing stops it outside");
    LEVELS.map(|checks| corruption(&contain(&mut domain(checks), &mistake)))
}

fn corruption(violation: &Violation) -> Corruption {
    match violation.kind() {
        ViolationKind::HeapCorruption(corruption) => *corruption,
        other => panic!("no heap corruption: {other:?}: {violation}"),
    }
}

#[track_caller]
fn assert_behind(found: [Corruption; 2], size: usize) {
    for found in found {
        assert_eq!((found.damage, found.size), (Damage::Behind, Some(size)));
    }
}

fn a_string_without_room_for_its_end() {
    for length in [8, 24, 31, 63, 1000, 5000, 100_000] {
        let text = vec![b'n'; length].into_iter().chain([0]).collect::<Vec<u8>>();
        // The end is a single zero byte.
        // SAFETY: deliberately unsound: the mistake under test.
        let found = corrupts(|| unsafe {
            let copy = malloc(libc::strlen(text.as_ptr().cast::<c_char>()));
            libc::strcpy(copy.cast(), text.as_ptr().cast());
            black_box(copy);
        });
        assert_behind(found, length);
    }
}

fn a_loop_that_goes_one_too_far() {
    for count in [6, 9, 250, 700] {
        // SAFETY: deliberately unsound: the mistake under test.
        let found = corrupts(|| unsafe {
            let table = malloc(count * 4).cast::<u32>();
            for index in 0..=count {
                table.add(index).write_volatile(0x0101_0101);
            }
        });
        assert_behind(found, count * 4);
    }
}

fn a_line_longer_than_its_buffer() {
    let line = [b'y'; 80];
    // SAFETY: deliberately unsound: the mistake under test.
    let found = corrupts(|| unsafe {
        let buffer = malloc(64);
        let _next = malloc(64);
        buffer.copy_from_nonoverlapping(black_box(line.as_ptr()), line.len());
        black_box(buffer);
    });
    assert_behind(found, 64);
}

fn a_size_that_overflowed() {
    // SAFETY: deliberately unsound: the mistake under test.
    let found = corrupts(|| unsafe {
        let (rows, row) = (black_box(0x1_0001_u32), black_box(0x1_0000_u32));
        let image = malloc(rows.wrapping_mul(row).wrapping_sub(0xffc0) as usize);
        let _others = [malloc(64), malloc(64)];
        image.write_bytes(0xee, 300);
        black_box(image);
    });
    assert_behind(found, 64);
}

fn a_trim_that_runs_below_the_start() {
    // Only the end is checked, and all of it is blank.
    // SAFETY: deliberately unsound: the mistake under test.
    let found = corrupts(|| unsafe {
        let text = malloc(16);
        text.write_bytes(b' ', 16);
        let mut end = 16isize;
        while end > -3 {
            end -= 1;
            text.offset(end).write_volatile(0);
        }
    });
    for found in found {
        assert_eq!(found.damage, Damage::Before);
    }
}

fn a_write_after_free() {
    for size in [24, 40, 600, 5000, 20_000] {
        // SAFETY: deliberately unsound: the mistake under test.
        let found = corrupts(|| unsafe {
            let node = malloc(size).cast::<u64>();
            node.write(1);
            free(node.cast());
            // The count of references, say.
            *node.add(1) = (*node.add(1)).wrapping_sub(1);
            black_box(node);
        });
        for found in found {
            assert_eq!(found.damage, Damage::Freed);
            assert!(found.site.is_some());
        }
    }
}

fn a_write_through_a_pointer_from_before_a_realloc() {
    // SAFETY: deliberately unsound: the mistake under test.
    let found = corrupts(|| unsafe {
        let items = malloc(64);
        let _next = malloc(64);
        let grown = libc::realloc(items.cast(), 640);
        assert_ne!(grown, items.cast());
        items.write_volatile(7);
    });
    for found in found {
        assert_eq!(found.damage, Damage::Freed);
    }
}

fn a_write_beyond_a_block_that_was_shrunk() {
    for (large, small) in [(100, 90), (2000, 1900), (9000, 2000)] {
        // SAFETY: deliberately unsound: the mistake under test.
        let found = corrupts(|| unsafe {
            let block = malloc(large);
            let block = libc::realloc(block.cast(), small).cast::<u8>();
            block.write_bytes(1, small + 1);
            black_box(block);
        });
        assert_behind(found, small);
    }
}

fn a_double_free_through_two_pointers() {
    for checks in LEVELS {
        for size in [40, 5000] {
            let mut domain = domain(checks);
            let freed = |again: bool| {
                let (block, other) = (malloc(size), malloc(size));
                let alias = black_box(if again { block } else { other });
                // SAFETY: deliberately unsound: the mistake under test.
                unsafe {
                    free(block);
                    free(malloc(size));
                    free(alias);
                }
            };
            domain.call(|| freed(false)).expect("control");
            let violation = contain(&mut domain, || freed(true));
            let kind = violation.kind();
            assert!(matches!(kind, ViolationKind::InvalidFree(HeapError::DoubleFree { .. })), "{violation}");
        }
    }
}

fn a_free_of_a_pointer_that_was_advanced() {
    for checks in LEVELS {
        let mut domain = domain(checks);
        for skip in [1, 16, 48] {
            // SAFETY: deliberately unsound: the mistake under test.
            let consume = |skip: usize| unsafe { free(malloc(200).add(skip)) };
            domain.call(|| consume(0)).expect("control");
            let violation = contain(&mut domain, || consume(skip));
            let kind = violation.kind();
            assert!(matches!(kind, ViolationKind::InvalidFree(HeapError::NotABlock { .. })), "{violation}");
        }
    }
}

fn a_pointer_that_was_never_initialised() {
    let target = black_box(Box::leak(Box::new(0u64)) as *mut u64);
    // What the last owner left is used as if it had just been set. New memory is zero, and that is checked.
    let read = || {
        for _ in 0..2000 {
            // SAFETY: deliberately unsound: the mistake under test.
            unsafe {
                let node = malloc(40).cast::<*mut u64>();
                let left = node.add(1).read_volatile();
                if !left.is_null() {
                    black_box(left.read_volatile());
                }
                node.add(1).write_volatile(target);
                free(node.cast());
            }
        }
    };
    for checks in LEVELS {
        let violation = contain(&mut domain(checks), read);
        assert_eq!(*violation.kind(), ViolationKind::GeneralProtection, "{violation}");
    }
}

fn an_overflow_long_after_the_allocation() {
    // SAFETY: deliberately unsound: the mistake under test.
    let found = corrupts(|| unsafe {
        let name = malloc(30);
        for _ in 0..50 {
            free(malloc(200));
        }
        name.add(30).write_volatile(b'!');
    });
    assert_behind(found, 30);
}

fn an_overflow_of_a_block_of_an_earlier_call() {
    for checks in LEVELS {
        let mut domain = domain(checks);
        let block = domain.call(|| malloc(100) as usize).unwrap() as *mut u8;
        let other = domain.call(|| malloc(100) as usize).unwrap() as *mut u8;
        // SAFETY: the block has 100 bytes.
        domain.call(|| unsafe { other.write_bytes(1, 100) }).expect("control");
        let overflow = |domain: &mut Domain| {
            // SAFETY: deliberately unsound: the mistake under test.
            domain.call(|| unsafe {
                block.write_bytes(1, 101);
                free(malloc(10));
            })
        };
        let violation = match checks {
            HeapChecks::Full => overflow(&mut domain).expect_err("it is found in the call"),
            _ => {
                overflow(&mut domain).expect("the block was not touched by malloc or free");
                // SAFETY: each block is freed once.
                domain.call(|| unsafe { free(other) }).expect("another block is not blamed");
                // SAFETY: deliberately unsound: the mistake under test.
                domain.call(|| unsafe { free(block) }).expect_err("it is found when it is freed")
            }
        };
        let found = corruption(&violation);
        assert_eq!((found.damage, found.block, found.size), (Damage::Behind, block as usize, Some(100)));
        works(&mut domain);
    }
}

fn an_overflow_before_a_callback() {
    for checks in LEVELS {
        let mut domain = domain(checks);
        for bytes in [40, 41] {
            let mut asked = 0;
            let result = domain.call_with(
                &mut [&mut |_| {
                    asked += 1;
                    0
                }],
                // SAFETY: deliberately unsound: the mistake under test.
                |callbacks| unsafe {
                    let block = malloc(40);
                    block.write_bytes(1, bytes);
                    let ask: extern "C" fn(*mut u8) -> u64 = std::mem::transmute(callbacks[0].pointer());
                    ask(block)
                },
            );
            if bytes == 40 {
                assert_eq!((result.expect("control"), asked), (0, 1));
            } else {
                assert_behind([corruption(&result.unwrap_err()); 2], 40);
                assert_eq!(asked, 0, "its arguments are not accepted");
            }
        }
        works(&mut domain);
    }
}

fn an_overflow_of_a_result() {
    for checks in LEVELS {
        let mut domain = domain(checks);
        for bytes in [50, 51] {
            let result = domain.call(|| {
                let mut result = Vec::<u8>::with_capacity(50);
                // SAFETY: deliberately unsound: the mistake under test.
                unsafe {
                    black_box(result.as_mut_ptr()).write_bytes(3, bytes);
                    result.set_len(50);
                }
                result
            });
            if bytes == 50 {
                assert_eq!(result.expect("control"), [3; 50]);
            } else {
                assert_behind([corruption(&result.unwrap_err()); 2], 50);
            }
        }
        works(&mut domain);
    }
}

fn overwritten_records_of_the_heap() {
    for checks in LEVELS {
        let mut domain = domain(checks);
        let first = domain.call(|| malloc(24) as usize).unwrap();
        let start = (first & !4095) as *mut u8;
        type Act = (&'static str, fn(*mut u8));
        let acts: [Act; 4] = [
            ("malloc", |_| {
                black_box(malloc(40));
            }),
            ("a large block", |_| {
                black_box(malloc(40_000));
            }),
            // SAFETY: the block is freed once.
            ("free", |block| unsafe { free(block) }),
            ("nothing else", |_| ()),
        ];
        for (what, act) in acts {
            for (fill, length) in [(0x41, 100), (0xff, 100), (0x41, first - start as usize), (0xff, 2000)] {
                let violation = contain(&mut domain, || {
                    let block = malloc(40);
                    // SAFETY: deliberately unsound: the mistake under test.
                    unsafe { start.write_bytes(fill, length) };
                    act(block);
                });
                let found = corruption(&violation);
                assert_eq!(
                    (found.damage, found.block),
                    (Damage::Records, start as usize),
                    "{what} {fill:#x}: {violation}"
                );
                // Its lists lead the allocator to an address that is none.
                let is_fault = violation.symbol().is_some_and(|symbol| symbol.to_string().contains("malloc::allocate"));
                if (checks, what, fill, length > 100) == (HeapChecks::Fast, "malloc", 0x41, true) {
                    assert!(is_fault, "{violation}");
                }
            }
        }
        // An access of the code's own stays what it is, also if its address comes from the heap.
        // SAFETY: deliberately unsound: the mistake under test.
        let violation = contain(&mut domain, || unsafe { (0x41_4141_4141 as *mut u8).write_volatile(1) });
        assert!(matches!(violation.kind(), ViolationKind::Unmapped { .. }), "control: {violation}");
    }
}

#[inline(never)]
fn the_one_that_frees(block: *mut u8) {
    // SAFETY: as for `free`.
    unsafe { free(block) };
    black_box(());
}

#[inline(never)]
fn the_one_that_allocates(size: usize) -> *mut u8 {
    // SAFETY: malloc takes any size.
    black_box(unsafe { libc::malloc(size) }.cast())
}

fn a_report_names_the_code_that_freed_or_allocated() {
    for checks in LEVELS {
        let mut domain = domain(checks);
        let violation = contain(&mut domain, || {
            let block = the_one_that_allocates(100);
            the_one_that_frees(block);
            // SAFETY: deliberately unsound: the mistake under test.
            unsafe { block.write_volatile(1) };
        });
        let text = violation.to_string();
        assert!(text.contains("heap corruption: freed memory: the block of at most 1"), "{text}");
        assert!(text.contains("after it was freed at 0x"), "{text}");
        assert!(violation.target().and_then(|symbol| symbol.name()).unwrap().ends_with("the_one_that_frees"), "{text}");

        let violation = contain(&mut domain, || {
            let block = the_one_that_allocates(100);
            // SAFETY: deliberately unsound: the mistake under test.
            unsafe { block.add(100).write_volatile(1) };
            the_one_that_frees(block);
        });
        let text = violation.to_string();
        assert!(text.contains("heap corruption: the bytes behind the 100-byte block at 0x"), "{text}");
        assert!(violation.symbol().and_then(|symbol| symbol.name()).unwrap().ends_with("the_one_that_frees"), "{text}");
        let allocates = violation.target().and_then(|symbol| symbol.name());
        match checks {
            HeapChecks::Full => assert!(allocates.unwrap().ends_with("the_one_that_allocates"), "{text}"),
            _ => assert_eq!(corruption(&violation).site, None),
        }
    }
}

fn correct_code_uses_all_of_its_blocks() {
    for checks in LEVELS {
        let mut domain = domain(checks);
        for round in 0..20usize {
            let kept = domain.call(|| {
                let mut blocks = Vec::new();
                for index in 0..400usize {
                    let size = (index * 37 + round * 101) % 3000;
                    // SAFETY: it stays in the blocks, and each is freed once.
                    unsafe {
                        let mut block = malloc(size);
                        block.write_bytes(index as u8, size);
                        if index % 3 == 0 {
                            block = libc::realloc(block.cast(), size + 100).cast();
                            block.add(size).write_bytes(index as u8, 100);
                        }
                        let usable = libc::malloc_usable_size(block.cast());
                        block.add(usable - usable.min(1)).write_bytes(index as u8, usable.min(1));
                        blocks.push((block, index));
                        if index % 2 == 0 {
                            let (block, _) = blocks.swap_remove(index % blocks.len());
                            free(block);
                        }
                    }
                }
                // SAFETY: the blocks have that many bytes.
                let good = blocks.iter().all(|(block, index)| unsafe {
                    let usable = libc::malloc_usable_size(block.cast());
                    (0..usable).all(|byte| *block.add(byte) == *index as u8)
                });
                // SAFETY: each block is freed once.
                blocks.into_iter().for_each(|(block, _)| unsafe { free(block) });
                good
            });
            assert!(kept.expect("correct code is no violation"));
        }
    }
}
