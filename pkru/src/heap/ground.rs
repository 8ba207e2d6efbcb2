//! The memory of a heap: places for blocks, and what the heap writes around and into them.
//!
//! The memory is a row of chunks without gaps, measured in granules. A chunk is a header, a block, and what is behind it:
//!
//! ```text
//!            │ granules, size │ check │  block: `size` bytes  │ canary │ unused │
//!  live      └─ word 0 ───────┴─ 1 ───┴───────────────────────┴────────┴────────┘
//!            │ granules, size │ check │ poison, site, poison, not specified     │
//!  freed     └────────────────┴───────┴─────────────────────────────────────────┘
//!            │ granules, next │ check │ link to the previous hole │ … │ footer  │
//!  hole      └────────────────┴───────┴───────────────────────────┴───┴─────────┘
//! ```
//!
//! The check is the other word, the block's address and a secret of the chunk's state, combined by exclusive or. Bytes
//! that are moved, filled or swapped do not pass for a header. The canary is a copy of the check.

use core::ptr::NonNull;

use super::error::{Damage, Fault};

/// The unit of sizes and offsets in bytes.
pub(super) const GRANULE: usize = 16;
/// The size of a header in bytes.
pub(super) const HEADER: usize = 16;
/// The size of a canary in bytes.
pub(super) const CANARY: usize = 8;
/// The fewest granules of a chunk.
pub(super) const LEAST: usize = 3;
/// The most granules of a heap.
pub(super) const MOST: usize = 1 << 30;

/// Word 0 of a header has the size in bytes of a live block, or the offset of the next chunk in a list, in this many
/// bits. The granules of the chunk are in the others.
pub(super) const LOW_BITS: u32 = 34;
const LOW: u64 = (1 << LOW_BITS) - 1;

/// A bit that every check has and no size of glibc's malloc: its sizes are multiples of 16 with three flags.
pub(super) const MARK: u64 = 8;

/// The words that a freed block is filled with. As an address it is not canonical.
pub(super) const POISON: u64 = 0xd5d5_d5d5_d5d5_d5d5;
/// The word of a freed block that holds the code address which freed it.
pub(super) const SITE: usize = 3;
/// The words of the smallest block.
pub(super) const WORDS: usize = 4;

/// The state of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// In use.
    Live,
    /// Free, on a list of its size.
    Small,
    /// Free, and held back.
    Held,
    /// Free, and merged with free neighbours.
    Hole,
    /// A header inside a hole, or inside what was allocated there since.
    Merged,
}

impl State {
    const ALL: [Self; 5] = [Self::Live, Self::Small, Self::Held, Self::Hole, Self::Merged];
}

/// A place where a block can lie.
///
/// Invariant: the header before it and the [`WORDS`] from it lie in the heap's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    block: *mut u64,
    pub(super) offset: usize,
}

/// A header whose check is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) state: State,
    pub(super) granules: usize,
    /// The size of a live or held block in bytes, or the offset of the next chunk in a list.
    pub(super) low: usize,
    /// The check.
    pub(super) check: u64,
}

/// The memory of a heap.
pub(super) struct Ground {
    /// The first chunk.
    pub(super) base: *mut u8,
    /// The offset of the last place. Offsets are in granules from `base`; the first place has the offset 1.
    pub(super) last: usize,
    /// The secret of each state, and of the links and the footers of holes.
    keys: [u64; State::ALL.len()],
    link: u64,
    footer: u64,
    /// What all of this adds up to.
    seal: u64,
}

impl Ground {
    /// # Safety
    ///
    /// `granules` from `base`, at least [`LEAST`], are the heap's alone and writable. The granule before is readable.
    pub(super) unsafe fn new(base: *mut u8, granules: usize, secret: u64) -> Self {
        let mut seed = secret;
        let mut next = || {
            // SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        let keys = State::ALL.map(|_| next() | MARK);
        let mut ground = Self { base, last: granules - 2, keys, link: next(), footer: next(), seal: 0 };
        ground.seal = ground.sum();
        ground
    }

    /// Inverted, so that filling everything with one word is no sum.
    #[inline]
    fn sum(&self) -> u64 {
        let others = [self.base as u64, self.last as u64, self.link, self.footer];
        !others.iter().chain(&self.keys).fold(0, |sum, word| sum ^ word)
    }

    /// Checks that nothing has overwritten this.
    #[inline]
    pub(super) fn check_seal(&self) -> Result<(), Fault> {
        if self.seal == self.sum() { Ok(()) } else { Err(self.records()) }
    }

    /// Returns that the heap's records are damaged.
    pub(super) fn records(&self) -> Fault {
        // The heap's first field is this.
        Fault::new(Damage::Records, core::ptr::from_ref(self).addr())
    }

    /// Returns the secret of a state.
    #[inline]
    pub(super) const fn key(&self, state: State) -> u64 {
        self.keys[state as usize]
    }

    /// Returns the number of granules.
    pub(super) const fn granules(&self) -> usize {
        self.last + 2
    }

    /// Returns whether an address lies in the chunks.
    pub(super) fn contains(&self, address: usize) -> bool {
        address.wrapping_sub(self.base as usize) < self.granules() * GRANULE
    }

    /// Returns the place with this offset.
    #[inline]
    pub(super) fn place(&self, offset: usize) -> Option<Place> {
        (1..=self.last).contains(&offset).then(|| Place { block: self.at(offset), offset })
    }

    /// Returns the place at an address.
    pub(super) fn place_at(&self, address: usize) -> Option<Place> {
        let distance = address.wrapping_sub(self.base as usize);
        if distance.is_multiple_of(GRANULE) { self.place(distance / GRANULE) } else { None }
    }

    /// Returns the place after a chunk; `None` if it is the last.
    #[inline]
    pub(super) fn after(&self, place: Place, granules: usize) -> Option<Place> {
        self.place(place.offset.saturating_add(granules))
    }

    fn at(&self, offset: usize) -> *mut u64 {
        self.base.wrapping_add(offset * GRANULE).cast()
    }

    /// Returns the header at a place; `None` if there is none.
    #[inline]
    pub(super) fn header(&self, place: Place) -> Option<Header> {
        let (word, check) = (place.word(-2), place.word(-1));
        let key = place.key(word, check);
        // In the order of how often they are met.
        let state = if key == self.key(State::Live) {
            State::Live
        } else if key == self.key(State::Hole) {
            State::Hole
        } else if key == self.key(State::Small) {
            State::Small
        } else if key == self.key(State::Held) {
            State::Held
        } else if key == self.key(State::Merged) {
            State::Merged
        } else {
            return None;
        };
        self.decode(place, word, check, state)
    }

    /// Returns the header at a place, if it has this state.
    #[inline(always)]
    pub(super) fn header_in(&self, place: Place, state: State) -> Option<Header> {
        let (word, check) = (place.word(-2), place.word(-1));
        if place.key(word, check) != self.key(state) {
            return None;
        }
        self.decode(place, word, check, state)
    }

    #[inline(always)]
    fn decode(&self, place: Place, word: u64, check: u64, state: State) -> Option<Header> {
        let (granules, low) = ((word >> LOW_BITS) as usize, (word & LOW) as usize);
        let fits = granules >= LEAST && granules <= self.last + 3 - place.offset;
        let holds = state != State::Live || low <= granules * GRANULE - HEADER - CANARY;
        (fits && holds).then_some(Header { state, granules, low, check })
    }

    /// Returns the header of a chunk that the heap's records say is there.
    #[inline]
    pub(super) fn expect(&self, place: Place) -> Result<Header, Fault> {
        match self.header(place) {
            Some(header) if header.state != State::Merged => Ok(header),
            _ => Err(Fault::new(Damage::Before, place.address())),
        }
    }

    /// Returns the header of a chunk that the heap's records say is in a state.
    #[inline]
    pub(super) fn expect_in(&self, place: Place, state: State) -> Result<Header, Fault> {
        self.header_in(place, state).ok_or_else(|| self.unexpected(place))
    }

    #[cold]
    fn unexpected(&self, place: Place) -> Fault {
        match self.expect(place) {
            Ok(_) => self.records(),
            Err(fault) => fault,
        }
    }

    /// Writes a header, and returns its check.
    #[inline]
    pub(super) fn write(&self, place: Place, state: State, granules: usize, low: usize) -> u64 {
        let word = ((granules as u64) << LOW_BITS) | low as u64;
        let check = (word ^ place.address() as u64 ^ self.key(state)) | MARK;
        place.set(-2, word);
        place.set(-1, check);
        check
    }

    /// Returns a pointer to the bytes behind a block.
    fn behind(place: Place, size: usize) -> *mut u64 {
        place.block.wrapping_byte_add(size)
    }

    /// Writes the canary behind a block of `size` bytes.
    ///
    /// # Safety
    ///
    /// The place has a chunk in which the block and the canary fit.
    pub(super) unsafe fn set_canary(place: Place, size: usize, check: u64) {
        // SAFETY: the bytes are in the chunk, by this function's contract.
        unsafe { Self::behind(place, size).write_unaligned(check) };
    }

    /// Checks the canary behind a live block.
    #[inline]
    pub(super) fn check_canary(&self, place: Place, header: &Header) -> Result<(), Fault> {
        debug_assert_eq!(header.state, State::Live);
        // SAFETY: `header` accepts only sizes that leave room for the canary in the chunk, and chunks in the heap.
        let canary = unsafe { Self::behind(place, header.low).read_unaligned() };
        if canary == header.check {
            return Ok(());
        }
        Err(Fault::new(Damage::Behind, place.address()))
    }

    /// Records where a block was allocated, in the last word of its chunk.
    ///
    /// # Safety
    ///
    /// The place has a chunk of so many granules, and the block leaves this word free.
    pub(super) unsafe fn set_allocation_site(&self, place: Place, granules: usize, site: usize) {
        // SAFETY: the word is in the chunk, by this function's contract.
        unsafe { Self::last_word(place, granules).write(self.hide_site(place.address(), site)) };
    }

    /// Returns the word that records where the block at an address was allocated.
    #[inline(always)]
    pub(super) const fn hide_site(&self, block: usize, site: usize) -> u64 {
        site as u64 ^ self.footer ^ block as u64
    }

    /// Returns where a block was allocated; `None` if that was not recorded, or overwritten.
    pub(super) fn allocation_site(&self, place: Place, header: &Header) -> Option<usize> {
        // SAFETY: `header` accepts only chunks in the heap.
        let word = unsafe { Self::last_word(place, header.granules).read() };
        let site = self.hide_site(place.address(), word as usize) as usize;
        // Code lies in the lower half of the addresses, or in the upper one.
        let is_address = (site >> 47) == 0 || (site >> 47) == usize::MAX >> 47;
        (site != 0 && is_address).then_some(site)
    }

    fn last_word(place: Place, granules: usize) -> *mut u64 {
        place.block.wrapping_add((granules - 1) * (GRANULE / size_of::<u64>()) - 1)
    }

    /// Returns the words of a free chunk after the one with the site that are filled, if all up to `most` are.
    #[inline]
    fn rest(place: Place, granules: usize, most: usize) -> NonNull<[u64]> {
        let words = (granules - 1) * (GRANULE / size_of::<u64>());
        let first = place.block.wrapping_add(SITE + 1);
        let first = NonNull::new(first).unwrap_or(NonNull::dangling());
        NonNull::slice_from_raw_parts(first, words.min(most).saturating_sub(SITE + 1))
    }

    /// Fills up to `most` words of a block that is freed, and notes where it was freed.
    ///
    /// # Safety
    ///
    /// The place has a chunk of so many granules.
    #[inline]
    pub(super) unsafe fn poison(place: Place, granules: usize, most: usize, site: usize) {
        (0..SITE as isize).for_each(|word| place.set(word, POISON));
        place.set(SITE as isize, site as u64);
        // SAFETY: the words are in the chunk, and nothing else refers to them.
        unsafe { Self::rest(place, granules, most).as_mut() }.fill(POISON);
    }

    /// Checks that a freed block is as [`poison`](Self::poison) has left it.
    #[inline]
    pub(super) fn check_poison(&self, place: Place, header: &Header, most: usize) -> Result<(), Fault> {
        // SAFETY: `header` accepts only chunks in the heap, and nothing writes the words meanwhile.
        let rest = unsafe { Self::rest(place, header.granules, most).as_ref() };
        // Without a branch for each word.
        let differences = rest.iter().fold(0, |differences, word| differences | (word ^ POISON));
        if differences == 0 && place.word(0) == POISON && place.word(1) == POISON && place.word(2) == POISON {
            return Ok(());
        }
        Err(Fault::new(Damage::Freed, place.address()))
    }

    /// Returns where a block was freed; `None` if that was not recorded.
    pub(super) fn free_site(place: Place) -> Option<usize> {
        Some(place.word(SITE as isize) as usize).filter(|site| *site != 0)
    }

    /// Writes a hole's link to the previous hole of its list; 0 if it is the first, which leaves no trace in new memory.
    #[inline]
    pub(super) fn set_previous(&self, place: Place, previous: usize) {
        let link = if previous == 0 { 0 } else { previous as u64 ^ self.link ^ place.address() as u64 };
        place.set(0, link);
    }

    /// Returns a hole's link to the previous hole.
    #[inline]
    pub(super) fn previous(&self, place: Place) -> Result<usize, Fault> {
        let link = place.word(0);
        let previous = if link == 0 { 0 } else { (link ^ self.link ^ place.address() as u64) as usize };
        if previous <= self.last { Ok(previous) } else { Err(Fault::new(Damage::Freed, place.address())) }
    }

    /// Writes the number of granules at the end of a hole that ends before `after`.
    #[inline]
    pub(super) fn set_footer(&self, after: Place, granules: usize) {
        after.set(-3, granules as u64 ^ self.footer ^ after.address() as u64);
    }

    /// Returns the hole that ends before a chunk. A footer that is no longer true leads to no hole.
    #[inline]
    pub(super) fn hole_before(&self, place: Place) -> Option<(Place, Header)> {
        if place.offset < 1 + LEAST {
            return None;
        }
        let granules = (place.word(-3) ^ self.footer ^ place.address() as u64) as usize;
        let before = self.place(place.offset.checked_sub(granules)?)?;
        let header = self.header_in(before, State::Hole)?;
        (header.granules == granules).then_some((before, header))
    }
}

impl Place {
    /// Returns the secret that makes these words a header.
    #[inline(always)]
    fn key(self, word: u64, check: u64) -> u64 {
        (word ^ check ^ self.address() as u64) | MARK
    }

    #[inline]
    pub(super) fn address(self) -> usize {
        self.block as usize
    }

    pub(super) const fn block(self) -> *mut u8 {
        self.block.cast()
    }

    /// Reads a word of the block, or one of the three before it. Those behind the first chunk's start are the heap's own.
    #[inline]
    fn word(self, index: isize) -> u64 {
        debug_assert!((-3..WORDS as isize).contains(&index));
        // SAFETY: the word is in the heap's memory by the invariant. Of the first place alone word -3 is not, and nobody
        // asks for it.
        unsafe { self.block.wrapping_offset(index).read() }
    }

    /// Writes such a word.
    #[inline]
    fn set(self, index: isize, value: u64) {
        debug_assert!((-3..WORDS as isize).contains(&index));
        // SAFETY: as for `word`.
        unsafe { self.block.wrapping_offset(index).write(value) };
    }
}
