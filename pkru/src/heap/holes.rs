//! The free memory that is not on a list of one size: a two-level segregated fit.
//!
//! A hole has no free neighbour. Its list holds holes of one range of sizes: each power of two is divided in eight.
//! Bitmaps tell which lists have holes, so that finding one takes as many steps with one hole as with a million.
//!
//! # References
//!
//! Masmano, Ripoll, Crespo and Real, "TLSF: a New Dynamic Memory Allocator for Real-Time Systems", ECRTS 2004.

use super::error::{Damage, Fault};
use super::ground::{Ground, Header, MOST, Place, State};

/// The lists of a row: a power of two, or all sizes below [`LISTS`].
const LISTS: usize = 1 << LISTS_LOG;
const LISTS_LOG: u32 = 3;
const ROWS: usize = (MOST.ilog2() - LISTS_LOG + 2) as usize;

/// The most holes of one list that a search looks at.
const PROBES: usize = 8;

/// The lists of holes. Each is doubly linked.
pub(super) struct Holes {
    /// The rows that have a hole, one bit each.
    rows: u32,
    /// The lists of a row that have a hole.
    lists: [u8; ROWS],
    /// The offset of the first hole of each list.
    first: [[u32; LISTS]; ROWS],
}

/// A list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct List {
    row: usize,
    list: usize,
}

impl List {
    /// Returns the list that a hole of this size is on.
    #[inline]
    fn of(granules: usize) -> Self {
        match granules.checked_ilog2() {
            Some(log) if log >= LISTS_LOG => {
                let row = (log - LISTS_LOG + 1) as usize;
                Self { row: row.min(ROWS - 1), list: (granules >> (log - LISTS_LOG)) % LISTS }
            }
            _ => Self { row: 0, list: granules },
        }
    }

    /// Returns the first list all of whose holes have at least this size.
    #[inline]
    fn all_at_least(granules: usize) -> Self {
        let step = granules.checked_ilog2().map_or(0, |log| log.saturating_sub(LISTS_LOG));
        Self::of(granules + (1 << step) - 1)
    }
}

impl Holes {
    pub(super) const fn new() -> Self {
        Self { rows: 0, lists: [0; ROWS], first: [[0; LISTS]; ROWS] }
    }

    /// Makes a hole of memory that has no hole before or after it.
    ///
    /// # Safety
    ///
    /// The memory is in the heap and not in use.
    pub(super) unsafe fn add(&mut self, ground: &Ground, place: Place, granules: usize) -> Result<(), Fault> {
        let List { row, list } = List::of(granules);
        let first = &mut self.first[row][list];
        let next = *first as usize;
        ground.write(place, State::Hole, granules, next);
        ground.set_previous(place, 0);
        // The last chunk has no footer. It would touch the last page of the heap.
        if let Some(after) = ground.after(place, granules) {
            ground.set_footer(after, granules);
        }
        if next != 0 {
            let next = in_list(ground, next)?;
            ground.set_previous(next.0, place.offset);
        }
        *first = place.offset as u32;
        self.lists[row] |= 1 << list;
        self.rows |= 1 << row;
        Ok(())
    }

    /// Takes a hole off its list. `next` is what its header says.
    pub(super) fn remove(&mut self, ground: &Ground, place: Place, granules: usize, next: usize) -> Result<(), Fault> {
        let List { row, list } = List::of(granules);
        let previous = ground.previous(place)?;
        if next != 0 {
            let (next, _) = in_list(ground, next)?;
            if ground.previous(next)? != place.offset {
                return Err(Fault::new(Damage::Records, next.address()));
            }
            ground.set_previous(next, previous);
        }
        if previous != 0 {
            let (before, header) = in_list(ground, previous)?;
            if header.low != place.offset {
                return Err(Fault::new(Damage::Records, before.address()));
            }
            ground.write(before, State::Hole, header.granules, next);
            return Ok(());
        }
        let first = &mut self.first[row][list];
        if *first as usize != place.offset {
            return Err(Fault::new(Damage::Records, place.address()));
        }
        *first = next as u32;
        if next == 0 {
            self.lists[row] &= !(1 << list);
            if self.lists[row] == 0 {
                self.rows &= !(1 << row);
            }
        }
        Ok(())
    }

    /// Takes a hole of at least `granules`. The hole is not split.
    pub(super) fn take(&mut self, ground: &Ground, granules: usize) -> Result<Option<(Place, usize)>, Fault> {
        if granules > ground.granules() {
            return Ok(None);
        }
        // The sizes of a list differ. The first hole of the request's own list may do, the holes of the next ones do.
        let own = List::of(granules);
        let mut found = self.probe(ground, own, granules, 1)?;
        if found.is_none() {
            found = match self.from(List::all_at_least(granules)) {
                Some(list) => Some(self.probe(ground, list, granules, 1)?.ok_or_else(|| ground.records())?),
                None => self.probe(ground, own, granules, PROBES)?,
            };
        }
        let Some((place, header)) = found else { return Ok(None) };
        self.remove(ground, place, header.granules, header.low)?;
        Ok(Some((place, header.granules)))
    }

    /// Returns the first list from this one on that has a hole.
    fn from(&self, List { row, list }: List) -> Option<List> {
        let here = self.lists[row] & (!0 << list);
        if here != 0 {
            return Some(List { row, list: here.trailing_zeros() as usize });
        }
        let above = self.rows & (!1 << row);
        let row = (above != 0).then(|| above.trailing_zeros() as usize).filter(|row| *row < ROWS)?;
        Some(List { row, list: (self.lists[row].trailing_zeros() as usize).min(LISTS - 1) })
    }

    /// Returns a hole of at least `granules` among the first few of a list.
    #[inline(always)]
    fn probe(
        &self,
        ground: &Ground,
        List { row, list }: List,
        granules: usize,
        most: usize,
    ) -> Result<Option<(Place, Header)>, Fault> {
        let mut next = self.first[row][list] as usize;
        for _ in 0..most {
            if next == 0 {
                return Ok(None);
            }
            let (place, header) = in_list(ground, next)?;
            if header.granules >= granules {
                return Ok(Some((place, header)));
            }
            next = header.low;
        }
        Ok(None)
    }

    /// Makes free memory a hole, together with the holes before and after it.
    ///
    /// # Safety
    ///
    /// The place has a chunk of so many granules, which is not in use.
    pub(super) unsafe fn merge(&mut self, ground: &Ground, place: Place, granules: usize) -> Result<(), Fault> {
        let (mut start, mut total) = (place, granules);
        if let Some(after) = ground.after(place, granules) {
            // A damaged header is found here, also if the chunk is in use.
            let header = ground.expect(after)?;
            if header.state == State::Hole {
                self.remove(ground, after, header.granules, header.low)?;
                ground.write(after, State::Merged, header.granules, 0);
                total += header.granules;
            }
        }
        if let Some((before, header)) = ground.hole_before(place) {
            self.remove(ground, before, header.granules, header.low)?;
            ground.write(place, State::Merged, granules, 0);
            (start, total) = (before, total + header.granules);
        }
        // SAFETY: holes are not in use, and neither is the chunk, by this function's contract.
        unsafe { self.add(ground, start, total) }
    }
}

/// Returns a hole that a list leads to.
#[inline(always)]
fn in_list(ground: &Ground, offset: usize) -> Result<(Place, Header), Fault> {
    let place = ground.place(offset).ok_or_else(|| ground.records())?;
    Ok((place, ground.expect_in(place, State::Hole)?))
}
