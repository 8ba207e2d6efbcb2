//! Finding out what is damaged.

use core::ptr::NonNull;

use super::DomainHeap;
use super::error::{Corruption, Damage, Fault, HeapError};
use super::ground::{CANARY, GRANULE, Ground, HEADER, Header, Place, State};

/// The most chunks that the full checks look at in turn.
const IN_TURN: usize = 1024;

impl DomainHeap {
    /// Returns whether anything was allocated, freed or resized since the last [`check`](Self::check).
    #[must_use]
    #[inline(always)]
    pub const fn was_used(&self) -> bool {
        self.touched.any()
    }

    /// Checks the blocks that were allocated, freed or resized since the last check: the last 128 times for small blocks,
    /// and the last 16 large blocks. With the full checks also 1,024 chunks, in turn.
    ///
    /// # Errors
    ///
    /// [`HeapError::Corrupt`] if one is damaged.
    pub fn check(&mut self) -> Result<(), HeapError> {
        self.check_all().map_err(|fault| self.describe(fault))
    }

    fn check_all(&mut self) -> Result<(), Fault> {
        self.check_touched()?;
        self.touched.clear();
        if self.is_full() && self.is_new != 1 {
            self.check_in_turn()?;
        }
        Ok(())
    }

    /// Returns what is known about damage.
    #[cold]
    pub(super) fn describe(&self, fault: Fault) -> HeapError {
        let (damage, block) = (fault.damage(), fault.block());
        let header = self.ground.place_at(block).and_then(|place| Some((place, self.ground.header(place)?)));
        let (size, site) = match (damage, header) {
            (Damage::Behind, Some((place, header))) => {
                let site = if self.is_full() { self.ground.allocation_site(place, &header) } else { None };
                (Some(header.low), site)
            }
            (Damage::Freed, Some((place, header))) => match header.state {
                State::Held => (Some(header.low), Ground::free_site(place)),
                State::Small => (Some(header.granules * GRANULE - HEADER - CANARY), Ground::free_site(place)),
                _ => (None, None),
            },
            _ => (None, None),
        };
        HeapError::Corrupt(Corruption { damage, block, size, site })
    }

    pub(super) fn check_touched(&self) -> Result<(), Fault> {
        self.ground.check_seal()?;
        let is_full = self.is_full();
        for offset in self.touched.small() {
            if is_full || !self.is_whole(*offset) {
                self.check_place(*offset as usize)?;
            }
        }
        if self.touched.any_large() {
            let mut large = self.touched.large();
            large.try_for_each(|offset| self.check_place(offset as usize))?;
            let mut held = (0..).map_while(|index| self.held.get(index));
            held.try_for_each(|offset| self.check_place(offset))?;
        }
        Ok(())
    }

    #[inline(always)]
    fn check_place(&self, offset: usize) -> Result<(), Fault> {
        let Some(place) = self.ground.place(offset) else { return Err(self.ground.records()) };
        match self.ground.expect(place) {
            Ok(header) => self.check_chunk(place, &header),
            Err(fault) => Err(self.with_neighbour(place, fault)),
        }
    }

    #[inline]
    fn check_chunk(&self, place: Place, header: &Header) -> Result<(), Fault> {
        match header.state {
            State::Live => self.ground.check_canary(place, header),
            State::Small | State::Held => self.ground.check_poison(place, header, self.poisoned_words(header.granules)),
            State::Hole | State::Merged => Ok(()),
        }
    }

    /// Checks some chunks, from where the last time has ended.
    fn check_in_turn(&mut self) -> Result<(), Fault> {
        // The chunk that the cursor points to may be no more.
        let first = self.ground.place(self.cursor).filter(|place| self.ground.expect(*place).is_ok());
        let mut next = first.or_else(|| self.ground.place(1));
        for _ in 0..IN_TURN {
            let Some(place) = next else { break };
            let header = self.ground.expect(place)?;
            self.check_chunk(place, &header)?;
            next = self.ground.after(place, header.granules);
        }
        self.cursor = next.map_or(1, |place| place.offset);
        Ok(())
    }

    /// Returns the place and header of a live block whose canary is right.
    pub(super) fn live(&self, block: NonNull<u8>) -> Result<(Place, Header), HeapError> {
        self.ground.check_seal().map_err(|fault| self.describe(fault))?;
        let address = block.as_ptr() as usize;
        let records = self.ground.base as usize - Self::RECORDS..self.ground.base as usize;
        if !self.ground.contains(address) && !records.contains(&address) {
            return Err(HeapError::Foreign { address });
        }
        let Some(place) = self.ground.place_at(address) else { return Err(HeapError::NotABlock { address }) };
        match self.ground.header(place) {
            Some(header) if header.state == State::Live => {
                self.ground.check_canary(place, &header).map_err(|fault| self.describe(fault))?;
                Ok((place, header))
            }
            Some(_) => Err(HeapError::DoubleFree { address }),
            None if self.is_new == 1 => Err(HeapError::NotABlock { address }),
            None => Err(self.explain(place)),
        }
    }

    /// Returns why there is no header at a place, by a walk over all chunks before it.
    #[cold]
    fn explain(&self, target: Place) -> HeapError {
        let mut next = self.ground.place(1);
        while let Some(place) = next.filter(|place| place.offset <= target.offset) {
            match self.ground.expect(place) {
                Ok(header) => next = self.ground.after(place, header.granules),
                Err(fault) => return self.describe(self.with_neighbour(place, fault)),
            }
        }
        HeapError::NotABlock { address: target.address() }
    }

    /// Blames the block before a damaged header instead, if what is behind that block is damaged too.
    #[cold]
    fn with_neighbour(&self, target: Place, fault: Fault) -> Fault {
        let mut next = self.ground.place(1);
        while let Some(place) = next.filter(|place| place.offset < target.offset) {
            let Ok(header) = self.ground.expect(place) else { break };
            next = self.ground.after(place, header.granules);
            if next == Some(target)
                && let Err(before) = self.check_chunk(place, &header)
            {
                return before;
            }
        }
        fault
    }
}
