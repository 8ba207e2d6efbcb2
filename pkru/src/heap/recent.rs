//! What was allocated and freed lately: the blocks to look at when a call ends, and large blocks that are held back.

/// The small blocks that are remembered.
const SMALL_EVENTS: usize = 128;
/// The large blocks that are remembered.
const LARGE_BLOCKS: usize = 16;
/// The large blocks that are held back.
const HELD: usize = 16;

/// Tells that large blocks were allocated or freed. The other bits count events of small blocks.
const LARGE: u32 = 1 << 31;

/// The blocks that a call has touched, as offsets.
pub(super) struct Touched {
    events: u32,
    small: [u32; SMALL_EVENTS],
    large: [u32; LARGE_BLOCKS],
    next_large: u32,
}

impl Touched {
    pub(super) const fn new() -> Self {
        Self { events: 0, small: [0; SMALL_EVENTS], large: [0; LARGE_BLOCKS], next_large: 0 }
    }

    /// Returns whether anything was allocated or freed since the last [`clear`](Self::clear).
    #[inline(always)]
    pub(super) const fn any(&self) -> bool {
        self.events != 0
    }

    /// Notes that a small block was allocated or freed.
    #[inline(always)]
    pub(super) fn note_small(&mut self, offset: u32) {
        self.small[usize::from(self.events as u8) % SMALL_EVENTS] = offset;
        self.events = self.events.wrapping_add(1);
    }

    /// Notes that a large block was allocated.
    pub(super) fn note_large(&mut self, offset: usize) {
        self.note_any_large();
        self.large[self.next_large as usize % LARGE_BLOCKS] = offset as u32;
        self.next_large = self.next_large.wrapping_add(1);
    }

    /// Notes that a large block was freed. It is among those held back.
    pub(super) const fn note_any_large(&mut self) {
        self.events |= LARGE;
    }

    /// Returns whether large blocks were allocated or freed.
    pub(super) const fn any_large(&self) -> bool {
        self.events & LARGE != 0
    }

    /// Returns the offsets of the small blocks.
    pub(super) fn small(&self) -> &[u32] {
        let count = (self.events & !LARGE) as usize;
        &self.small[..count.min(SMALL_EVENTS)]
    }

    /// Returns the offsets of the large blocks.
    pub(super) fn large(&self) -> impl Iterator<Item = u32> {
        self.large.into_iter().filter(|offset| *offset != 0)
    }

    /// Forgets a large block that becomes a hole.
    pub(super) fn forget_large(&mut self, offset: usize) {
        for slot in &mut self.large {
            if *slot == offset as u32 {
                *slot = 0;
            }
        }
    }

    /// Forgets the small blocks.
    pub(super) const fn clear(&mut self) {
        self.events = 0;
    }

    /// Forgets all blocks, but not that there were any.
    pub(super) const fn forget_all(&mut self) {
        self.large = [0; LARGE_BLOCKS];
        self.events = LARGE;
    }
}

/// Large blocks that are held back, as offsets: first in, first out.
pub(super) struct Held {
    ring: [u32; HELD],
    first: u32,
    count: u32,
    granules: usize,
    /// The most granules that are held back.
    most: usize,
}

impl Held {
    pub(super) const fn new(most: usize) -> Self {
        Self { ring: [0; HELD], first: 0, count: 0, granules: 0, most }
    }

    /// Returns whether a block leaves before one of this size may join.
    pub(super) const fn is_full_for(&self, granules: usize) -> bool {
        self.count as usize >= HELD || (self.count != 0 && self.granules.saturating_add(granules) > self.most)
    }

    /// Returns whether blocks of this size are held back.
    pub(super) const fn admits(&self, granules: usize) -> bool {
        granules <= self.most
    }

    /// Adds a block.
    pub(super) const fn push(&mut self, offset: usize, granules: usize) {
        self.ring[self.first.wrapping_add(self.count) as usize % HELD] = offset as u32;
        self.count = self.count.saturating_add(1);
        self.granules = self.granules.saturating_add(granules);
    }

    /// Removes the oldest block and returns its offset.
    pub(super) const fn pop(&mut self) -> Option<usize> {
        if self.count == 0 {
            return None;
        }
        let offset = self.ring[self.first as usize % HELD];
        self.first = self.first.wrapping_add(1);
        self.count -= 1;
        Some(offset as usize)
    }

    /// Notes that granules have left.
    pub(super) const fn left(&mut self, granules: usize) {
        self.granules = self.granules.saturating_sub(granules);
    }

    /// Returns the offset of a block that is held back; `None` after the last one.
    pub(super) fn get(&self, index: usize) -> Option<usize> {
        let in_use = index < HELD && index < self.count as usize;
        in_use.then(|| self.ring[self.first.wrapping_add(index as u32) as usize % HELD] as usize)
    }
}
