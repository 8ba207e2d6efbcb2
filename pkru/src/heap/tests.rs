use std::boxed::Box;
use std::vec;
use std::vec::Vec;

use super::ground::SITE;
use super::*;

#[repr(C, align(4096))]
struct Arena([u8; 1 << 18]);

const BOTH: [HeapChecks; 2] = [HeapChecks::Fast, HeapChecks::Full];

fn heap(checks: HeapChecks) -> &'static mut DomainHeap {
    let arena = Box::leak(Box::new(Arena([0xaa; 1 << 18])));
    // SAFETY: the arena is leaked, and nothing else has a pointer to it.
    let heap = unsafe { DomainHeap::create(NonNull::from(&mut arena.0).cast(), arena.0.len(), checks, 7) };
    // SAFETY: as above.
    unsafe { &mut *heap.as_ptr() }
}

fn allocate(heap: &mut DomainHeap, size: usize) -> NonNull<u8> {
    heap.allocate(size, ALIGNMENT, 0x1111).unwrap().unwrap()
}

fn free(heap: &mut DomainHeap, block: NonNull<u8>) -> Result<(), HeapError> {
    // SAFETY: the tests do not use blocks after this, except for a mistake under test.
    unsafe { heap.free(block, 0x2222) }
}

fn resize(heap: &mut DomainHeap, block: NonNull<u8>, size: usize) -> Result<Option<NonNull<u8>>, HeapError> {
    // SAFETY: the tests do not use the old block after this.
    unsafe { heap.reallocate(block, size, 0x3333) }
}

/// Writes a byte at an offset from a block.
fn poke(block: NonNull<u8>, offset: isize, byte: u8) {
    // SAFETY: the tests stay in the arena.
    unsafe { block.as_ptr().wrapping_offset(offset).write(byte) };
}

fn corruption<T: fmt::Debug>(result: Result<T, HeapError>) -> Corruption {
    match result {
        Err(HeapError::Corrupt(corruption)) => corruption,
        other => panic!("no corruption: {other:?}"),
    }
}

#[test]
fn blocks_are_aligned_disjoint_and_large_enough() {
    for checks in BOTH {
        let heap = heap(checks);
        let mut blocks: Vec<(usize, usize)> = Vec::new();
        for size in [0, 1, 15, 16, 17, 100, 1024, 1025, 5000] {
            for align in [1, 8, 16, 32, 64, 512, 4096] {
                let Some(block) = heap.allocate(size, align, 0).unwrap() else { continue };
                assert!((block.as_ptr() as usize).is_multiple_of(align.max(ALIGNMENT)));
                assert_eq!(heap.usable_size(block).unwrap(), size);
                blocks.push((block.as_ptr() as usize, size));
            }
        }
        blocks.sort_unstable();
        assert!(blocks.len() > 40, "most fit");
        assert!(blocks.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0), "no two blocks overlap");
        heap.check().unwrap();
    }
}

#[test]
fn freed_memory_is_allocated_again() {
    for checks in BOTH {
        let heap = heap(checks);
        for round in 0..100 {
            let next = |index: usize| heap.allocate(16 + (index * 7 + round) % 2000, 16, 0).unwrap();
            let blocks: Vec<_> = (0..).map_while(next).collect();
            assert!(blocks.len() > 20, "round {round}: {} blocks", blocks.len());
            for block in blocks {
                free(heap, block).unwrap();
            }
        }
        assert!(heap.allocate(250_000, 16, 0).unwrap().is_some(), "adjacent chunks are merged");
    }
}

#[test]
fn allocate_zeroed_clears_the_block() {
    let heap = heap(HeapChecks::Fast);
    let block = heap.allocate_zeroed(100, 0).unwrap().unwrap();
    // SAFETY: the block has 100 bytes.
    assert_eq!(unsafe { core::slice::from_raw_parts(block.as_ptr(), 100) }, vec![0; 100]);
}

#[test]
fn resizing_keeps_the_contents() {
    for checks in BOTH {
        let heap = heap(checks);
        let mut block = allocate(heap, 10);
        // SAFETY: the block has 10 bytes.
        unsafe { block.copy_from_nonoverlapping(NonNull::from(b"0123456789").cast(), 10) };
        for size in [11, 24, 3000, 3001, 9000, 30_000, 2000, 1500, 900, 10] {
            block = resize(heap, block, size).unwrap().unwrap();
            assert_eq!(heap.usable_size(block), Ok(size));
            // SAFETY: the new block has at least 10 bytes.
            assert_eq!(unsafe { core::slice::from_raw_parts(block.as_ptr(), 10) }, b"0123456789");
            heap.check().unwrap();
        }
        assert_eq!(resize(heap, block, 1 << 20), Ok(None));
        assert_eq!(heap.usable_size(block), Ok(10));
    }
}

#[test]
fn a_large_block_grows_where_it_is() {
    let heap = heap(HeapChecks::Fast);
    let block = allocate(heap, 2000);
    assert_eq!(resize(heap, block, 40_000), Ok(Some(block)));
    assert_eq!(resize(heap, block, 3000), Ok(Some(block)));
    assert!(heap.allocate(250_000, 16, 0).unwrap().is_some(), "what is behind it is free again");
}

#[test]
fn impossible_sizes_and_alignments_fail() {
    for checks in BOTH {
        let heap = heap(checks);
        for size in [1 << 18, usize::MAX, usize::MAX - 15, isize::MAX as usize] {
            for align in [16, 4096, 1 << 40, 1 << 63] {
                assert_eq!(heap.allocate(size, align, 0), Ok(None));
                assert_eq!(heap.last_failed(), size);
            }
        }
        assert_eq!(heap.allocate(16, 24, 0), Ok(None), "24 is not a power of two");
        assert_eq!(heap.allocate(16, 1 << 40, 0), Ok(None));
        assert_eq!(heap.allocate(16, 1 << 63, 0), Ok(None));
        assert_eq!(heap.last_failed(), 16);
    }
}

#[test]
fn each_misuse_has_its_error() {
    for checks in BOTH {
        for size in [64, 5000] {
            let heap = heap(checks);
            let block = allocate(heap, size);
            let address = block.as_ptr() as usize;
            let other = Box::new([0u64; 8]);
            // SAFETY: the 8 bytes before both pointers are readable.
            assert!(unsafe { DomainHeap::marks(block) });
            // SAFETY: as above.
            assert!(!unsafe { DomainHeap::marks(NonNull::from(&other[4]).cast()) });
            // SAFETY: the addresses are in the block.
            let [aligned, odd] = [16, 3].map(|offset| unsafe { block.add(offset) });
            for inside in [aligned, odd] {
                let address = inside.as_ptr() as usize;
                assert_eq!(free(heap, inside), Err(HeapError::NotABlock { address }));
            }
            free(heap, block).unwrap();
            assert_eq!(free(heap, block), Err(HeapError::DoubleFree { address }));
            assert_eq!(resize(heap, block, 10), Err(HeapError::DoubleFree { address }));
            assert_eq!(free(heap, aligned), Err(HeapError::NotABlock { address: address + 16 }));
            // SAFETY: the 8 bytes before the block are in the arena.
            assert!(unsafe { DomainHeap::marks(block) });
            let mut outside = 0u8;
            let foreign = NonNull::from(&mut outside);
            assert_eq!(free(heap, foreign), Err(HeapError::Foreign { address: foreign.as_ptr() as usize }));
            let records = NonNull::from(&mut *heap).cast::<u8>();
            assert_eq!(free(heap, records), Err(HeapError::NotABlock { address: records.as_ptr() as usize }));
            let base = NonNull::new(heap.ground.base).unwrap();
            assert_eq!(free(heap, base), Err(HeapError::NotABlock { address: base.as_ptr() as usize }));
        }
    }
}

#[test]
fn a_block_that_was_merged_is_known_to_be_free() {
    let heap = heap(HeapChecks::Fast);
    let blocks = [(); 4].map(|()| allocate(heap, 9000));
    for block in blocks {
        free(heap, block).unwrap();
    }
    heap.give_back_all().unwrap();
    for block in blocks {
        assert_eq!(free(heap, block), Err(HeapError::DoubleFree { address: block.as_ptr() as usize }));
    }
}

#[test]
fn a_write_behind_a_block_is_found() {
    for checks in BOTH {
        for size in [0, 1, 24, 60, 64, 1000, 1025, 9000] {
            for (offset, byte) in [(0, 0), (0, b'A'), (3, 0), (7, 0xff)] {
                let heap = heap(checks);
                let block = allocate(heap, size);
                heap.check().unwrap();
                let block = if offset == 3 { resize(heap, block, size).unwrap().unwrap() } else { block };
                poke(block, size as isize + offset, byte);
                let found = heap.check();
                let expected = Corruption {
                    damage: Damage::Behind,
                    block: block.as_ptr() as usize,
                    size: Some(size),
                    site: (checks == HeapChecks::Full).then_some(if offset == 3 { 0x3333 } else { 0x1111 }),
                };
                if offset == 3 || checks == HeapChecks::Full {
                    assert_eq!(corruption(found), expected, "{checks:?} {size} {offset}");
                }
                assert_eq!(corruption(free(heap, block)), expected, "{checks:?} {size} {offset}");
                assert_eq!(corruption(resize(heap, block, 5)), expected, "{checks:?} {size} {offset}");
            }
        }
    }
}

#[test]
fn a_write_before_a_block_is_found() {
    for checks in BOTH {
        for size in [8, 100, 3000] {
            for offset in [-1, -8, -9, -16] {
                let heap = heap(checks);
                let block = allocate(heap, size);
                // SAFETY: the byte is in the arena.
                let old = unsafe { block.as_ptr().wrapping_offset(offset).read() };
                poke(block, offset, old ^ 0x14);
                let found = corruption(heap.check());
                assert_eq!((found.damage, found.block), (Damage::Before, block.as_ptr() as usize));
                assert_eq!(corruption(free(heap, block)), found, "and the free is not blamed");
            }
        }
    }
}

#[test]
fn a_long_overflow_is_blamed_on_its_block() {
    for checks in BOTH {
        for size in [40, 2000] {
            let heap = heap(checks);
            let blocks = [(); 3].map(|()| allocate(heap, size));
            for offset in 0..64 {
                poke(blocks[0], size as isize + offset, b'x');
            }
            let block = blocks[0].as_ptr() as usize;
            // The header of the next block is damaged too.
            for found in [free(heap, blocks[1]), free(heap, blocks[0]), heap.check()] {
                let found = corruption(found);
                assert_eq!((found.damage, found.block, found.size), (Damage::Behind, block, Some(size)));
            }
        }
    }
}

#[test]
fn a_write_to_a_freed_block_is_found() {
    for checks in BOTH {
        for size in [1, 24, 100, 1000, 2000, 9000] {
            for offset in [0, 8, 23, 40, 63, 500] {
                let end = if checks == HeapChecks::Full || size > 1024 { size.min(64) } else { 24 };
                if offset >= end || offset / 8 == SITE || offset >= size + 8 {
                    continue;
                }
                let heap = heap(checks);
                let block = allocate(heap, size);
                free(heap, block).unwrap();
                heap.check().unwrap();
                let again = allocate(heap, size);
                free(heap, again).unwrap();
                poke(again, offset as isize, 0);
                let found = corruption(heap.check());
                assert_eq!((found.damage, found.site), (Damage::Freed, Some(0x2222)));
                assert_eq!(found.block, again.as_ptr() as usize);
                let found = found.size.unwrap();
                assert!((size..size + 48).contains(&found), "{size}: {found}");
                assert_eq!(heap.give_back_all().unwrap_err().damage(), Damage::Freed);
            }
        }
    }
}

#[test]
fn a_freed_block_is_held_back() {
    for checks in BOTH {
        for size in [40, 500, 5000] {
            let heap = heap(checks);
            let first = allocate(heap, size);
            free(heap, first).unwrap();
            let mut until = 0;
            while allocate(heap, size) != first {
                until += 1;
                if until > 8 {
                    break;
                }
            }
            assert!(until > 0, "{checks:?} {size}: it is allocated again at once");
        }
    }
}

#[test]
fn a_damaged_free_list_is_found_before_memory_is_given_out_twice() {
    let heap = heap(HeapChecks::Fast);
    let blocks = [(); 40].map(|()| allocate(heap, 40));
    for block in blocks {
        free(heap, block).unwrap();
    }
    // A cycle, made by the heap's own function.
    let [a, b] = [blocks[3], blocks[30]].map(|block| heap.ground.place_at(block.as_ptr() as usize).unwrap());
    let granules = heap.ground.header(a).unwrap().granules;
    heap.ground.write(a, State::Small, granules, b.offset);
    let mut live = Vec::new();
    let end = loop {
        match heap.allocate(40, 16, 0) {
            Ok(Some(block)) => {
                assert!(!live.contains(&block), "given out twice");
                live.push(block);
            }
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    assert!(matches!(end, Some(HeapError::Corrupt(_))), "{end:?}");
}

#[test]
fn a_check_looks_only_when_something_was_touched() {
    let heap = heap(HeapChecks::Fast);
    assert!(!heap.was_used());
    let block = allocate(heap, 2000);
    assert!(heap.was_used());
    heap.check().unwrap();
    assert!(!heap.was_used());
    free(heap, block).unwrap();
    assert!(heap.was_used());
    heap.check().unwrap();
    let small = allocate(heap, 20);
    assert!(heap.was_used());
    heap.check().unwrap();
    free(heap, small).unwrap();
    assert!(heap.was_used());
}

#[test]
fn the_full_checks_look_at_old_blocks_in_turn() {
    let heap = heap(HeapChecks::Full);
    let old = allocate(heap, 100);
    for _ in 0..100 {
        let block = allocate(heap, 50);
        free(heap, block).unwrap();
    }
    heap.check().unwrap();
    poke(old, 100, 1);
    allocate(heap, 60);
    assert_eq!(corruption(heap.check()).block, old.as_ptr() as usize);
}

#[test]
fn a_write_to_a_freed_block_is_found_when_it_is_allocated_again() {
    for checks in BOTH {
        let heap = heap(checks);
        let freed = allocate(heap, 100);
        free(heap, freed).unwrap();
        poke(freed, 17, 0);
        let again = |heap: &mut DomainHeap| {
            let block = heap.allocate(100, ALIGNMENT, 0)?.expect("there is room");
            free(heap, block)
        };
        let error = (0..1000).find_map(|_| again(heap).err()).expect("the block comes round");
        let found = corruption::<()>(Err(error));
        assert_eq!((found.damage, found.block), (Damage::Freed, freed.as_ptr() as usize));
    }
}

#[test]
fn a_hole_is_unlinked_only_if_its_neighbours_agree() {
    let heap = heap(HeapChecks::Fast);
    let blocks = [(); 6].map(|()| allocate(heap, 9000));
    for block in [blocks[0], blocks[2], blocks[4]] {
        free(heap, block).unwrap();
    }
    heap.give_back_all().unwrap();
    // The three are on one list. The link back of the first one's successor is made to lead elsewhere.
    let [a, b, c] = [0, 2, 4].map(|index| heap.ground.place_at(blocks[index].as_ptr() as usize).unwrap());
    let second = [a, b, c].into_iter().find(|place| heap.ground.previous(*place).unwrap() != 0).unwrap();
    let previous = heap.ground.place(heap.ground.previous(second).unwrap()).unwrap();
    let other = [a, b, c].into_iter().find(|place| *place != second && *place != previous).unwrap();
    heap.ground.set_previous(second, other.offset);
    let header = heap.ground.header(previous).unwrap();
    let removed = heap.holes.remove(&heap.ground, previous, header.granules, header.low);
    assert_eq!(removed.unwrap_err().damage(), Damage::Records);
}
