//! Free chunks of small sizes, on lists of one size each.
//!
//! A list has three generations. A chunk that is freed joins the youngest, and the oldest is allocated from. When the
//! oldest is empty and the youngest has grown enough, each takes the next one's place. So a chunk is held back until
//! about as many of its size have been allocated as a generation has.

use super::error::Fault;
use super::ground::{Ground, Header, Place, State};

/// The most granules of a small chunk.
pub(super) const SMALL: usize = (1024 + 39) / 16;
const SIZES: usize = SMALL + 1;

/// The lists, by size in granules. A list is the offset of its first chunk.
pub(super) struct Small {
    pub(super) old: [u32; SIZES],
    pub(super) middle: [u32; SIZES],
    pub(super) young: [u32; SIZES],
    /// The number of chunks of each young generation and of each middle one.
    pub(super) young_count: [u32; SIZES],
    middle_count: [u32; SIZES],
    /// The granules that a generation has at least.
    generation: usize,
}

impl Small {
    pub(super) const fn new(generation: usize) -> Self {
        let (none, zero) = ([0; SIZES], [0; SIZES]);
        Self { old: none, middle: none, young: none, young_count: zero, middle_count: zero, generation }
    }

    /// Adds a chunk that is free.
    pub(super) fn put(&mut self, ground: &Ground, place: Place, granules: usize) {
        let first = &mut self.young[granules];
        ground.write(place, State::Small, granules, *first as usize);
        *first = place.offset as u32;
        self.young_count[granules] = self.young_count[granules].wrapping_add(1);
    }

    /// Lets each generation take the next one's place, if the oldest is empty and it is time. Returns whether the oldest
    /// has chunks now.
    pub(super) fn rotate(&mut self, granules: usize) -> bool {
        if granules > SMALL || self.old[granules] != 0 {
            return false;
        }
        let least = (self.generation / granules.max(1)).max(1) as u32;
        // A generation that was much larger is not left alone.
        if self.young_count[granules] < least && self.middle_count[granules] <= least.saturating_mul(2) {
            return false;
        }
        self.old[granules] = core::mem::take(&mut self.middle[granules]);
        self.middle[granules] = core::mem::take(&mut self.young[granules]);
        self.middle_count[granules] = core::mem::take(&mut self.young_count[granules]);
        self.old[granules] != 0
    }

    /// Takes a chunk of this size that has been held back.
    pub(super) fn take(&mut self, ground: &Ground, granules: usize) -> Result<Option<(Place, Header)>, Fault> {
        if self.old[granules] == 0 && !self.rotate(granules) {
            return Ok(None);
        }
        pop(ground, &mut self.old[granules], granules)
    }

    /// Takes any chunk of this size.
    pub(super) fn take_any(&mut self, ground: &Ground, granules: usize) -> Result<Option<(Place, Header)>, Fault> {
        for list in [&mut self.old[granules], &mut self.middle[granules], &mut self.young[granules]] {
            if let Some(found) = pop(ground, list, granules)? {
                return Ok(Some(found));
            }
        }
        (self.young_count[granules], self.middle_count[granules]) = (0, 0);
        Ok(None)
    }
}

fn pop(ground: &Ground, list: &mut u32, granules: usize) -> Result<Option<(Place, Header)>, Fault> {
    if *list == 0 {
        return Ok(None);
    }
    let place = ground.place(*list as usize).ok_or_else(|| ground.records())?;
    let header = ground.expect_in(place, State::Small)?;
    if header.granules != granules {
        return Err(ground.records());
    }
    *list = header.low as u32;
    Ok(Some((place, header)))
}
