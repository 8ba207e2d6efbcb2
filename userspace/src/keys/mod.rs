//! The protection keys of this process, and which domain has which.
//!
//! There are fewer keys than a program may want domains, so a domain has a key only while it needs one. A call *pins*
//! the key of its domain; what nobody pins can be taken away: the pages of the domain that has gone longest without a
//! call are given the *closed* key, which no domain has rights to, and its own key goes to the domain that is called.
//! Keys are taken from the kernel when they are first needed and never given back: `pkey_free` does not untag pages,
//! and a key that still tags some would give its next owner access to them.
//!
//! Pinning is one compare-and-swap on a cache line of the key's own; only a domain that has lost its key takes a lock.
//!
//! # References
//!
//! pkeys(7); pkey_alloc(2).

mod slots;

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pkru::ProtectionKey;

use crate::monitor::monitored;
use crate::sys::BlockedSignals;
use crate::thread::{self, Thread};
use crate::{Error, sys};
use slots::{Number, Slot};

pub(crate) use slots::{Pin, abandon, running_on};

/// The memory of one domain, as something that carries a key.
#[derive(Debug)]
pub(crate) struct Tagged {
    number: Number,
    /// Whole pages, private and writable, which nothing else tags.
    ranges: Box<[Range<usize>]>,
    /// The slot of the key it has. Changed under the lock of [`KEYS`].
    slot: AtomicPtr<Slot>,
    /// Keys that some pages may carry since an attempt to tag them failed, one bit each. They are nobody's until all
    /// pages carry another. Changed under that lock too.
    stains: AtomicU16,
}

impl Tagged {
    /// Describes memory that has no key yet.
    pub(crate) fn new(ranges: Box<[Range<usize>]>) -> Arc<Self> {
        let number = Number::next();
        let slot = AtomicPtr::new(ptr::from_ref(Slot::NONE).cast_mut());
        Arc::new(Self { number, ranges, slot, stains: AtomicU16::new(0) })
    }

    /// Returns the key that it has at the moment.
    pub(crate) fn key(&self) -> Option<ProtectionKey> {
        self.slot().key()
    }

    #[inline]
    fn slot(&self) -> &'static Slot {
        // SAFETY: only slots are stored here, which are static.
        unsafe { &*self.slot.load(Ordering::Relaxed) }
    }

    fn set_slot(&self, slot: &'static Slot) {
        self.slot.store(ptr::from_ref(slot).cast_mut(), Ordering::Relaxed);
    }

    /// Pins its key for a call on this thread, if the memory still has one.
    #[inline]
    pub(crate) fn pin(&self, thread: &Thread) -> Option<Pin> {
        self.slot().pin(self.number, thread)
    }

    /// Pins a key for a call on this thread, which it has to be given first: this one if `want` says so. Waits while
    /// calls of other threads pin all of them.
    #[cold]
    pub(crate) fn bind(self: &Arc<Self>, thread: &Thread, want: Option<ProtectionKey>) -> Result<Pin, Error> {
        let mut waiting = Waiting::new();
        loop {
            let mut keys = Keys::lock();
            // It can be pinned already: by a call that a signal handler has left by a jump.
            if self.key().is_some() || keys.give(self, want, thread)? {
                self.slot().give(self.number);
                return self.pin(thread).ok_or_else(|| keys.exhausted());
            }
            waiting.go_on(keys, Some(thread))?;
        }
    }

    /// Unmaps the memory by a function that says whether no page carries the key any more, and gives the key back if
    /// so. Nobody tags the memory meanwhile.
    pub(crate) fn leave(&self, unmap: impl FnOnce() -> bool) {
        // A handler that forks in the middle would find a key that is about to come back.
        let _quiet = BlockedSignals::new();
        let (key, stains) = {
            let mut keys = Keys::lock();
            let key = self.key();
            if let Some(key) = key {
                Slot::of(key).claim();
                self.set_slot(Slot::NONE);
                keys.owners[key.index()] = None;
                keys.leaving += 1;
            }
            (key, self.take_stains())
        };
        let is_clean = unmap();
        let mut keys = Keys::lock();
        keys.leaving -= usize::from(key.is_some());
        // A key that pages still carry is lost with them.
        if is_clean {
            keys.put_back_all(key.map_or(0, bit) | stains);
        }
    }

    fn take_stains(&self) -> u16 {
        self.stains.swap(0, Ordering::Relaxed)
    }

    /// Gives all ranges this key.
    fn tag(&self, key: ProtectionKey) -> io::Result<()> {
        for range in &self.ranges {
            // SAFETY: the ranges are private memory that carries the key of its domain, whatever that is.
            unsafe { sys::protect(range.clone(), key) }?;
        }
        Ok(())
    }

    /// Tags pages again that were mapped anew.
    pub(crate) fn tag_again(&self) -> io::Result<()> {
        let keys = Keys::lock();
        match self.key().or(keys.closed) {
            Some(key) => self.tag(key),
            // It never had a key, and gets its first when it is called.
            None => Ok(()),
        }
    }
}

/// The time that a thread waits for a key.
struct Waiting {
    tries: u32,
}

impl Waiting {
    /// How long a thread waits that itself pins keys, in tries of 100 microseconds.
    const MOST: u32 = 5000;

    const fn new() -> Self {
        Self { tries: 0 }
    }

    /// Waits a little, for calls of other threads to end; an error if that is no use. A call that this thread's signal
    /// handler has interrupted, or whose result it is receiving, cannot end before this one; and others may be waiting
    /// for that.
    fn go_on(&mut self, keys: Locked, thread: Option<&Thread>) -> Result<(), Error> {
        let pins = thread.is_some_and(|thread| keys.are_pinned_by(thread));
        if pins && (self.tries > Self::MOST || thread.is_some_and(|thread| keys.are_only_pinned_by(thread))) {
            return Err(keys.exhausted());
        }
        drop(keys);
        self.tries = self.tries.saturating_add(1);
        if self.tries < 100 {
            std::thread::yield_now()
        } else {
            std::thread::sleep(Duration::from_micros(100))
        }
        Ok(())
    }
}

/// Who has what, under one lock.
pub(crate) struct Keys {
    /// The most keys to take from the kernel.
    limit: usize,
    /// Keys that this process has, one bit each: taken from the kernel, or handed in.
    ours: u16,
    /// Those of them that tag nothing.
    free: u16,
    /// The key of what no domain may touch.
    closed: Option<ProtectionKey>,
    owners: [Option<Arc<Tagged>>; ProtectionKey::COUNT],
    /// How many keys are about to come back, of memory that is being unmapped.
    leaving: usize,
    /// The [number](Thread::number) of the thread that has no domain given a key at the moment, but in calls of its own;
    /// 0 if none does.
    withheld_by: u64,
}

monitored! {
    static KEYS: Mutex<Keys> = Mutex::new(Keys {
        limit: ProtectionKey::COUNT - 1,
        ours: 0,
        free: 0,
        closed: None,
        owners: [const { None }; ProtectionKey::COUNT],
        leaving: 0,
        withheld_by: 0,
    });
}

/// The lock on [`KEYS`], with every signal blocked: a handler on this thread that calls a domain would wait for it in
/// vain.
pub(crate) struct Locked {
    // In this order they are dropped.
    keys: MutexGuard<'static, Keys>,
    _blocked: BlockedSignals,
}

impl Deref for Locked {
    type Target = Keys;

    fn deref(&self) -> &Keys {
        &self.keys
    }
}

impl DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut Keys {
        &mut self.keys
    }
}

impl Locked {
    /// In the child of a fork, whose thread has forked with this lock: what other threads were about is over.
    pub(crate) fn adopt(&mut self, thread: Option<&Thread>) {
        self.withheld_by = 0;
        self.leaving = 0;
        for slot in ProtectionKey::all().map(Slot::of) {
            if slot.is_pinned() && !thread.is_some_and(|thread| slot.is_pinned_by(thread)) {
                slot.unpin();
            }
        }
    }
}

impl Keys {
    pub(crate) fn lock() -> Locked {
        if thread::is_in_domain() {
            // It is not for code in a domain to get here: let it fault at once, while the signals of faults are open.
            drop(KEYS.lock());
        }
        let blocked = BlockedSignals::new();
        Locked { keys: KEYS.lock().unwrap_or_else(PoisonError::into_inner), _blocked: blocked }
    }

    /// Gives memory that has none a key; `false` if calls pin all of them.
    fn give(&mut self, memory: &Arc<Tagged>, want: Option<ProtectionKey>, thread: &Thread) -> Result<bool, Error> {
        // Who withholds them waits for the calls that run to end, and those may need others to.
        let is_withheld = self.withheld_by != 0 && self.withheld_by != thread.number();
        if is_withheld && !self.are_pinned_by(thread) {
            return Ok(false);
        }
        let Some(key) = self.obtain(want)? else { return Ok(false) };
        if let Err(error) = memory.tag(key) {
            memory.stains.fetch_or(bit(key), Ordering::Relaxed);
            return Err(Error::system("give a domain's memory a protection key")(error));
        }
        // Nothing carries those any more.
        self.put_back_all(memory.take_stains() & !bit(key));
        memory.set_slot(Slot::of(key));
        self.owners[key.index()] = Some(memory.clone());
        slots::note_change();
        Ok(true)
    }

    /// Finds a key that tags nothing, or makes one so; `None` if calls pin all of them.
    fn obtain(&mut self, want: Option<ProtectionKey>) -> Result<Option<ProtectionKey>, Error> {
        if let Some(want) = want {
            if self.closed == Some(want) {
                return Err(self.exhausted());
            }
            if self.free & bit(want) == 0 {
                if self.owners[want.index()].is_none() && self.leaving == 0 {
                    // Something has it for good.
                    return Err(self.exhausted());
                }
                if !self.take_away(want)? {
                    return Ok(None);
                }
            }
            self.free &= !bit(want);
            return Ok(Some(want));
        }
        if self.free == 0 {
            // The last of them is kept for what is closed.
            let kept = usize::from(self.closed.is_none() && self.ours != 0);
            if (self.ours.count_ones() as usize) + kept < self.limit {
                self.take_from_kernel()?;
            }
        }
        if self.free == 0 {
            self.provide_closed()?;
            let mut idle: Vec<_> = ProtectionKey::all().filter(|key| self.owners[key.index()].is_some()).collect();
            // Without a key for what is closed, one of those in use becomes it.
            if idle.len() < 2 && self.closed.is_none() {
                return if self.leaving == 0 { Err(self.exhausted()) } else { Ok(None) };
            }
            idle.sort_by_key(|key| Slot::of(*key).last_used());
            for key in idle {
                if self.take_away(key)? {
                    break;
                }
            }
        }
        let key = ProtectionKey::new(self.free.trailing_zeros() as u8);
        if let Some(key) = key {
            self.free &= !bit(key);
        } else if self.leaving == 0 && self.owners.iter().all(Option::is_none) {
            return Err(self.exhausted());
        }
        Ok(key)
    }

    /// Notes that a key tags nothing any more.
    fn put_back(&mut self, key: ProtectionKey) {
        Slot::of(key).free();
        self.free |= bit(key);
    }

    /// The same of several, one bit each.
    fn put_back_all(&mut self, keys: u16) {
        ProtectionKey::all().filter(|key| keys & bit(*key) != 0).for_each(|key| self.put_back(key));
    }

    const fn exhausted(&self) -> Error {
        Error::KeysExhausted { limit: self.ours.count_ones() as usize }
    }

    /// Makes sure that there is a closed key, if one can be had that no domain has.
    fn provide_closed(&mut self) -> Result<(), Error> {
        if self.closed.is_none() && self.free == 0 && (self.ours.count_ones() as usize) < self.limit {
            self.take_from_kernel()?;
        }
        if self.closed.is_none() {
            self.closed = ProtectionKey::new(self.free.trailing_zeros() as u8);
            self.free &= self.free.wrapping_sub(1);
        }
        Ok(())
    }

    /// Whether domains can still take turns: with one key for what is closed, and another.
    fn suffice(&mut self) -> Result<bool, Error> {
        let left = |keys: &Self| {
            let owned = keys.owners.iter().flatten().count();
            owned + keys.free.count_ones() as usize + usize::from(keys.closed.is_some()) + keys.leaving
        };
        while left(self) < 2 && (self.ours.count_ones() as usize) < self.limit {
            if !self.take_from_kernel()? {
                break;
            }
        }
        Ok(left(self) >= 2)
    }

    /// Takes a key from the kernel, if it has one left.
    fn take_from_kernel(&mut self) -> Result<bool, Error> {
        match sys::pkey_alloc() {
            Ok(key) => {
                self.ours |= bit(key);
                self.free |= bit(key);
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok(false),
            Err(error) => Err(Error::system("take a protection key from the kernel")(error)),
        }
    }

    /// Closes the memory that has a key, so that the key tags nothing; `false` if a call pins it or nobody has it.
    fn take_away(&mut self, key: ProtectionKey) -> Result<bool, Error> {
        let Some(owner) = self.owners[key.index()].clone() else { return Ok(false) };
        let slot = Slot::of(key);
        if !slot.claim_from(owner.number) {
            return Ok(false);
        }
        let closed = match self.closed {
            Some(closed) => closed,
            None => {
                // There is none left: this very key becomes the closed one, with the memory that it tags.
                self.closed = Some(key);
                self.lose(key, &owner);
                return Ok(false);
            }
        };
        if let Err(error) = owner.tag(closed) {
            // Back to where it was, or it has none now.
            if owner.tag(key).is_ok() {
                slot.give(owner.number);
            } else {
                owner.stains.fetch_or(bit(key), Ordering::Relaxed);
                self.lose(key, &owner);
            }
            return Err(Error::system("take a domain's protection key away")(error));
        }
        self.lose(key, &owner);
        self.put_back(key);
        Ok(true)
    }

    /// The slots of the keys that domains have.
    fn owned(&self) -> impl Iterator<Item = &'static Slot> {
        ProtectionKey::all().filter(|key| self.owners[key.index()].is_some()).map(Slot::of)
    }

    /// Whether a call of this thread pins a key.
    pub(crate) fn are_pinned_by(&self, thread: &Thread) -> bool {
        self.owned().any(|slot| slot.is_pinned_by(thread))
    }

    /// Whether every key that a domain has is pinned by a call of this thread.
    fn are_only_pinned_by(&self, thread: &Thread) -> bool {
        self.leaving == 0 && self.owned().all(|slot| slot.is_pinned_by(thread))
    }

    /// Takes the keys of all domains away; `false` if calls pin some.
    fn take_all_away(&mut self, thread: &Thread) -> Result<bool, Error> {
        self.provide_closed()?;
        let owned: Vec<_> = ProtectionKey::all().filter(|key| self.owners[key.index()].is_some()).collect();
        for key in &owned {
            if Slot::of(*key).is_pinned_by(thread) {
                return Err(Error::InDomain);
            }
            self.take_away(*key)?;
        }
        Ok(owned.is_empty())
    }

    fn lose(&mut self, key: ProtectionKey, owner: &Tagged) {
        owner.set_slot(Slot::NONE);
        self.owners[key.index()] = None;
        slots::note_change();
    }
}

const fn bit(key: ProtectionKey) -> u16 {
    1 << key.number()
}

/// Runs a function at a moment when no domain has a key, so that each learns of what the function does to rights when
/// it is next given one. Waits for calls of other threads to end.
///
/// # Errors
///
/// The function's, and [`Error::InDomain`] if the calling thread is itself in the middle of a call.
pub(crate) fn while_none_has_a_key(thread: &Thread, function: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    Keys::lock().withheld_by = thread.number();
    let result = loop {
        let mut keys = Keys::lock();
        match keys.take_all_away(thread) {
            Ok(true) => break function(),
            Ok(false) => {}
            Err(error) => break Err(error),
        }
        // Calls that are to end may need the lock for that.
        drop(keys);
        std::thread::yield_now();
    };
    Keys::lock().withheld_by = 0;
    result
}

/// Takes a key for memory that keeps it for good, or until [`give_back`].
pub(crate) fn take() -> Result<ProtectionKey, Error> {
    let mut waiting = Waiting::new();
    loop {
        let mut keys = Keys::lock();
        if let Some(key) = keys.obtain(None)? {
            Slot::of(key).claim();
            return Ok(key);
        }
        waiting.go_on(keys, thread::current())?;
    }
}

/// Takes a key as [`take`] does, unless too few would be left for domains.
pub(crate) fn take_for_good() -> Result<ProtectionKey, Error> {
    let key = take()?;
    let mut keys = Keys::lock();
    if keys.suffice()? {
        return Ok(key);
    }
    keys.put_back(key);
    Err(keys.exhausted())
}

/// Gives a key back that [`take`] gave, and that tags nothing any more.
pub(crate) fn give_back(key: ProtectionKey) {
    Keys::lock().put_back(key);
}

/// Returns the key of what no domain may touch.
pub(crate) fn closed() -> Result<ProtectionKey, Error> {
    if let Some(closed) = Keys::lock().closed {
        return Ok(closed);
    }
    let key = take()?;
    let mut keys = Keys::lock();
    match keys.closed {
        // Another thread was faster.
        Some(closed) => {
            keys.put_back(key);
            Ok(closed)
        }
        None => {
            keys.closed = Some(key);
            Ok(key)
        }
    }
}

/// Sets how many protection keys this crate takes from the kernel at most, for all domains together: 15 if this is not
/// called.
///
/// A program that uses keys itself leaves itself some by this. Domains beyond the number of keys take turns: a domain
/// that is called while others have all keys takes the key of the one that was called longest ago, which costs some
/// system calls. One key is needed for closing those, so at least 2 keys make for any number of domains. Keys that have
/// been taken are kept.
///
/// # Examples
///
/// ```
/// // Before the first domain, on any machine.
/// pkru_userspace::set_key_limit(8);
/// ```
pub fn set_key_limit(limit: usize) {
    Keys::lock().limit = limit.min(ProtectionKey::COUNT - 1);
}

/// Hands in a protection key that the program has taken from the kernel, for domains to use.
///
/// # Safety
///
/// The key is allocated and tags no page, and the program does not use it any more.
pub unsafe fn hand_in_key(key: ProtectionKey) {
    let mut keys = Keys::lock();
    if key != ProtectionKey::DEFAULT && keys.ours & bit(key) == 0 {
        keys.ours |= bit(key);
        keys.free |= bit(key);
    }
}
