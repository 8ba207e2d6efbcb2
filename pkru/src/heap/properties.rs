//! Random histories of a heap, against a model, with and without damage.

use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const SIZE: usize = 1 << 17;

#[repr(C, align(4096))]
struct Arena([u8; SIZE]);

/// Where damage is done.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// From an address, by its fraction of the memory.
    Anywhere(u16),
    /// From an offset to a live block's start or end.
    Near { which: u16, offset: i8, end: bool },
    /// In a block that was freed.
    Freed { which: u16, offset: u8 },
    /// In the lists of free memory and of what was touched.
    Lists(u16),
}

#[derive(Debug, Clone)]
enum Step {
    Allocate { size: usize, align: usize, zeroed: bool },
    Free { which: u16 },
    Resize { which: u16, size: usize },
    FreeAgain { which: u16 },
    Check,
    Damage { target: Target, bytes: Vec<u8> },
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0..200usize, 3 => 200..2000usize, 2 => 2000..20_000usize, 1 => 20_000..200_000usize]
}

fn step(damage: u32) -> impl Strategy<Value = Step> {
    let align = prop_oneof![10 => Just(16usize), 1 => (5..13u32).prop_map(|log| 1 << log)];
    let target = prop_oneof![
        2 => any::<u16>().prop_map(Target::Anywhere),
        4 => (any::<u16>(), -24..24i8, any::<bool>())
            .prop_map(|(which, offset, end)| Target::Near { which, offset, end }),
        4 => (any::<u16>(), 0..80u8).prop_map(|(which, offset)| Target::Freed { which, offset }),
        1 => any::<u16>().prop_map(Target::Lists),
    ];
    prop_oneof![
        40 => (size(), align, any::<bool>()).prop_map(|(size, align, zeroed)| Step::Allocate { size, align, zeroed }),
        30 => any::<u16>().prop_map(|which| Step::Free { which }),
        15 => (any::<u16>(), size()).prop_map(|(which, size)| Step::Resize { which, size }),
        3 => any::<u16>().prop_map(|which| Step::FreeAgain { which }),
        5 => Just(Step::Check),
        damage => (target, proptest::collection::vec(any::<u8>(), 1..24))
            .prop_map(|(target, bytes)| Step::Damage { target, bytes }),
    ]
}

/// A heap and what is known about it.
struct World {
    heap: NonNull<DomainHeap>,
    arena: NonNull<Arena>,
    /// The size and the fill of each live block, by address.
    live: BTreeMap<usize, (usize, u8)>,
    freed: Vec<usize>,
    is_damaged: bool,
    fill: u8,
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: `new` has leaked it.
        drop(unsafe { Box::from_raw(self.arena.as_ptr()) });
    }
}

impl World {
    fn new(checks: HeapChecks, secret: u64) -> Self {
        let arena = NonNull::from(Box::leak(Box::new(Arena([0; SIZE]))));
        // SAFETY: the arena lives as long as the world, and nothing else uses it.
        let heap = unsafe { DomainHeap::create(arena.cast(), SIZE, checks, secret) };
        Self { heap, arena, live: BTreeMap::new(), freed: Vec::new(), is_damaged: false, fill: 0 }
    }

    fn heap(&mut self) -> &mut DomainHeap {
        // SAFETY: the heap lives as long as the world, and this is the only reference.
        unsafe { self.heap.as_mut() }
    }

    fn pick(&self, which: u16) -> Option<usize> {
        let index = usize::from(which) % self.live.len().max(1);
        self.live.keys().copied().nth(index)
    }

    fn pointer(address: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("no block is at address 0")
    }

    /// Adds a block that the heap has allocated, and fills it.
    fn add(&mut self, block: NonNull<u8>, size: usize, align: usize, kept: Option<(usize, u8)>) {
        let address = block.as_ptr() as usize;
        let start = self.arena.as_ptr() as usize;
        assert!(address.is_multiple_of(align));
        assert!(address >= start + DomainHeap::RECORDS && address + size + 8 <= start + SIZE, "it is in the heap");
        // The invariant that holds with damage too.
        let below = self.live.range(..=address).next_back();
        let above = self.live.range(address..).next();
        assert!(below.is_none_or(|(other, (size, _))| other + size < address), "two live blocks overlap");
        assert!(above.is_none_or(|(other, _)| address + size < *other), "two live blocks overlap");
        if let Some((length, fill)) = kept.filter(|_| !self.is_damaged) {
            assert!((0..length.min(size)).all(|byte| Self::byte(address + byte) == fill), "the contents were kept");
        }
        self.fill = self.fill.wrapping_add(1);
        // SAFETY: the block is in the arena, and has this size.
        unsafe { block.write_bytes(self.fill, size) };
        self.live.insert(address, (size, self.fill));
        self.freed.retain(|freed| *freed != address);
    }

    fn byte(address: usize) -> u8 {
        // SAFETY: the tests ask for bytes of the arena.
        unsafe { (address as *const u8).read() }
    }

    /// Takes a step. Returns whether the heap goes on.
    fn step(&mut self, step: &Step) -> Result<(), HeapError> {
        match *step {
            Step::Allocate { size, align, zeroed } => {
                let block = if zeroed {
                    self.heap().allocate_zeroed(size, 1)?
                } else {
                    self.heap().allocate(size, align, 1)?
                };
                let Some(block) = block else { return Ok(()) };
                if zeroed {
                    assert!((0..size).all(|byte| Self::byte(block.as_ptr() as usize + byte) == 0));
                }
                self.add(block, size, if zeroed { 16 } else { align }, None);
            }
            Step::Free { which } => {
                let Some(address) = self.pick(which) else { return Ok(()) };
                self.check_contents(address);
                // SAFETY: the world does not use the block afterwards.
                unsafe { self.heap().free(Self::pointer(address), 2) }?;
                self.live.remove(&address);
                self.freed.push(address);
            }
            Step::Resize { which, size } => {
                let Some(address) = self.pick(which) else { return Ok(()) };
                // SAFETY: the world does not use the old block afterwards.
                let block = unsafe { self.heap().reallocate(Self::pointer(address), size, 3) }?;
                if let Some(block) = block {
                    let kept = self.live.remove(&address);
                    self.freed.push(address);
                    self.add(block, size, 16, kept);
                }
            }
            Step::FreeAgain { which } => {
                let index = usize::from(which) % self.freed.len().max(1);
                let Some(address) = self.freed.get(index).copied() else { return Ok(()) };
                // SAFETY: deliberately unsound: the mistake under test. The heap finds it.
                let result = unsafe { self.heap().free(Self::pointer(address), 4) };
                if self.is_damaged {
                    return result;
                }
                assert!(
                    matches!(result, Err(HeapError::DoubleFree { .. } | HeapError::NotABlock { .. })),
                    "{result:?} for a block that was freed"
                );
            }
            Step::Check => self.heap().check()?,
            Step::Damage { target, ref bytes } => self.damage(target, bytes),
        }
        Ok(())
    }

    fn check_contents(&self, address: usize) {
        let (size, fill) = self.live[&address];
        assert!(self.is_damaged || (0..size).all(|byte| Self::byte(address + byte) == fill), "the contents were kept");
    }

    fn damage(&mut self, target: Target, bytes: &[u8]) {
        let start = self.arena.as_ptr() as usize;
        let chunks = start + DomainHeap::RECORDS;
        let at = match target {
            Target::Anywhere(part) => chunks + usize::from(part) * (SIZE - DomainHeap::RECORDS) / 65_536,
            Target::Near { which, offset, end } => {
                let Some(address) = self.pick(which) else { return };
                let from = if end { address + self.live[&address].0 } else { address };
                from.wrapping_add_signed(isize::from(offset))
            }
            Target::Freed { which, offset } => {
                let index = usize::from(which) % self.freed.len().max(1);
                let Some(address) = self.freed.get(index) else { return };
                address + usize::from(offset)
            }
            // Not the ground's own fields: a wrong base would lead out of the arena. In a domain that is a fault.
            Target::Lists(part) => {
                let records = start + size_of::<Ground>()..chunks;
                records.start + usize::from(part) % records.len()
            }
        };
        self.is_damaged = true;
        let lists_end = if at < chunks { chunks } else { start + SIZE };
        for (offset, byte) in bytes.iter().enumerate() {
            if at + offset >= start + size_of::<Ground>() && at + offset < lists_end {
                // SAFETY: the byte is in the arena, and the heap takes any for what it is.
                unsafe { ((at + offset) as *mut u8).write(*byte) };
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn correct_code_never_sees_an_error(
        full in any::<bool>(),
        secret in any::<u64>(),
        steps in proptest::collection::vec(step(0), 1..400),
    ) {
        let mut world = World::new(if full { HeapChecks::Full } else { HeapChecks::Fast }, secret);
        for step in &steps {
            if let Err(error) = world.step(step) {
                panic!("{step:?}: {error}");
            }
        }
        while let Some(address) = world.pick(0) {
            world.step(&Step::Free { which: 0 }).unwrap_or_else(|error| panic!("{address:#x}: {error}"));
        }
        world.step(&Step::Check).unwrap();
        world.heap().give_back_all().unwrap();
        let whole = SIZE - DomainHeap::RECORDS - 64;
        prop_assert!(world.heap().allocate(whole, 16, 0).unwrap().is_some(), "all of it is one hole again");
    }

    #[test]
    fn damage_is_an_error_before_two_blocks_overlap(
        full in any::<bool>(),
        secret in any::<u64>(),
        steps in proptest::collection::vec(step(4), 1..400),
    ) {
        let mut world = World::new(if full { HeapChecks::Full } else { HeapChecks::Fast }, secret);
        for step in &steps {
            match world.step(step) {
                Ok(()) => {}
                // The domain would be discarded.
                Err(_) if world.is_damaged => break,
                Err(error) => panic!("{step:?}: {error}"),
            }
        }
    }
}
