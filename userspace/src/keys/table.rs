//! The key table: which memory has which key.
//!
//! It knows keys, page ranges and callers, and neither system calls nor PKRU: those are behind [`Tagger`]. Property
//! tests (`properties.rs`) and a model checker (`model.rs`) run over it on any machine.

#![expect(unsafe_code, reason = "it keeps a pointer to a slot for the fast path")]

use std::io;
use std::mem;
use std::ops::{Deref, DerefMut, Range};
use std::ptr;

use pkru::{KeySet, ProtectionKey};

use super::caller::Caller;
use super::remains::{Remains, Unmap};
use super::slots::{Pin, Slot, Slots};
use super::sync::{Arc, AtomicPtr, Mutex, MutexGuard, Ordering, PoisonError, pause};
use super::tagged::Tagged;
use crate::Error;
use crate::memory::layout::Run;
use crate::sys::Protection;

/// What the table needs of the system.
pub(super) trait Tagger {
    /// Keeps signal handlers from running on this thread until it is dropped.
    type Quiet;

    /// Blocks signals. A handler on this thread that calls a domain would wait for the table's lock for ever.
    fn quiet(&self) -> Self::Quiet;

    /// Allocates a key that tags nothing; `None` if the system has none left.
    fn allocate(&self) -> io::Result<Option<ProtectionKey>>;

    /// Gives pages a key, and the protection that they have. On failure some of them may have the key.
    ///
    /// # Safety
    ///
    /// The pages are whole, and belong to the caller.
    unsafe fn tag(&self, pages: Range<usize>, protection: Protection, key: ProtectionKey) -> io::Result<()>;
}

/// The table.
#[derive(Debug)]
pub(super) struct Table<T> {
    pub(super) tagger: T,
    pub(super) slots: Slots,
    pub(super) keys: Mutex<Keys>,
}

/// The part of the table that its lock protects.
#[derive(Debug)]
pub(super) struct Keys {
    /// The most keys to allocate.
    pub(super) limit: usize,
    /// The keys of this process: allocated, or handed in by the program.
    pub(super) ours: KeySet,
    /// Those of them that tag nothing and have no owner.
    pub(super) free: KeySet,
    /// The key of memory that no domain may access.
    pub(super) closed: Option<ProtectionKey>,
    /// The memory that has each key.
    pub(super) owners: [Option<Arc<Tagged>>; ProtectionKey::COUNT],
    /// What is left of failures. Each is tried again, until it succeeds, whenever a key is needed and whenever memory is
    /// made or released.
    pub(super) remains: Vec<Remains>,
    /// How many keys are about to become free: their memory is being unmapped.
    pub(super) releasing: usize,
    /// The [number](Caller::number) of the thread that withholds keys from all other threads, but for the calls within
    /// which they are; 0 if none does.
    pub(super) withheld_by: u64,
}

impl Keys {
    pub(super) const fn new() -> Self {
        Self {
            limit: ProtectionKey::COUNT - 1,
            ours: KeySet::EMPTY,
            free: KeySet::EMPTY,
            closed: None,
            owners: [const { None }; ProtectionKey::COUNT],
            remains: Vec::new(),
            releasing: 0,
            withheld_by: 0,
        }
    }
}

/// The table with its lock held and signals blocked.
pub(super) struct Locked<'a, T: Tagger> {
    table: &'a Table<T>,
    // Dropped in this order.
    keys: MutexGuard<'a, Keys>,
    _quiet: T::Quiet,
    /// What has succeeded at last. Dropping it may unload a library, whose destructors may call domains.
    done: Vec<Remains>,
}

impl<T: Tagger> Deref for Locked<'_, T> {
    type Target = Keys;

    fn deref(&self) -> &Keys {
        &self.keys
    }
}

impl<T: Tagger> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut Keys {
        &mut self.keys
    }
}

impl<T: Tagger> Table<T> {
    pub(super) fn lock(&self) -> Locked<'_, T> {
        let quiet = self.tagger.quiet();
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { table: self, keys, done: Vec::new(), _quiet: quiet }
    }

    /// Describes memory that has no key yet. It belongs to this table from now on.
    pub(super) fn describe(&self, runs: Box<[Run]>) -> Arc<Tagged> {
        // What fails still is in nobody's way here.
        let _ = self.lock().clear_remains();
        let slot = AtomicPtr::new(ptr::from_ref(self.slots.none()).cast_mut());
        let runs = Mutex::new(runs);
        Arc::new(Tagged { number: self.slots.next_number(), runs, slot })
    }

    #[inline]
    fn slot_of(&self, memory: &Tagged) -> &Slot {
        // SAFETY: `describe` and `set_slot` store slots of this table, which is borrowed.
        unsafe { &*memory.slot.load(Ordering::Relaxed) }
    }

    fn set_slot(&self, memory: &Tagged, slot: &Slot) {
        memory.slot.store(ptr::from_ref(slot).cast_mut(), Ordering::Relaxed);
    }

    /// Returns the key that memory has at the moment.
    pub(super) fn key_of(&self, memory: &Tagged) -> Option<ProtectionKey> {
        self.slots.key_of(self.slot_of(memory))
    }

    /// Returns the pinned key.
    pub(super) fn pinned_key(&self, pin: &Pin<'_>) -> ProtectionKey {
        self.slots.key_of(pin.slot).expect("a key that is pinned is not key 0")
    }

    /// Pins the memory's key for a call on this thread, if it has one.
    #[inline]
    pub(super) fn pin(&self, memory: &Tagged, caller: Caller) -> Option<Pin<'_>> {
        self.slots.pin(self.slot_of(memory), memory.number, caller)
    }

    /// Gives memory a key and pins it for a call on this thread: the key `want` if there is one. Waits while calls of
    /// other threads pin all keys.
    #[cold]
    pub(super) fn assign_key(
        &self,
        memory: &Arc<Tagged>,
        caller: Caller,
        want: Option<ProtectionKey>,
    ) -> Result<Pin<'_>, Error> {
        let mut waiting = Waiting::new();
        loop {
            let mut locked = self.lock();
            // A call that a signal handler left by a jump may have it pinned already.
            if self.key_of(memory).is_some() || locked.give(memory, want, caller)? {
                self.slot_of(memory).give(memory.number);
                return self.pin(memory, caller).ok_or_else(|| locked.exhausted());
            }
            waiting.go_on(locked, Some(caller))?;
        }
    }

    /// Takes the key from memory that `unmap` unmaps. `unmap` returns whether no page carries the key afterwards; else it
    /// is called again later, and the key is nobody's until then. Nothing tags the memory meanwhile.
    pub(super) fn release(&self, memory: &Tagged, mut unmap: impl Unmap) {
        // A signal handler that forks here would copy a key that never becomes free.
        let _quiet = self.tagger.quiet();
        let (key, keys) = {
            let mut locked = self.lock();
            let key = self.key_of(memory);
            if let Some(key) = key {
                self.slots.of(key).claim();
                self.set_slot(memory, self.slots.none());
                locked.owners[key.index()] = None;
                locked.releasing += 1;
            }
            let tainted = locked.take_tainted(memory);
            (key, key.map_or(tainted, |key| tainted.with(key)))
        };
        let is_clean = unmap();
        let mut locked = self.lock();
        locked.releasing -= usize::from(key.is_some());
        if is_clean {
            locked.put_back_all(keys);
        } else {
            locked.remains.push(Remains::of_mapping(keys, unmap));
        }
        let _ = locked.clear_remains();
    }

    /// Gives back a key that [`take`](Self::take) returned, once `unmap` has unmapped what carries it.
    pub(super) fn give_back_after(&self, key: ProtectionKey, mut unmap: impl Unmap) {
        let _quiet = self.tagger.quiet();
        let is_clean = unmap();
        let mut locked = self.lock();
        if is_clean {
            locked.put_back(key);
        } else {
            locked.remains.push(Remains::of_mapping(KeySet::EMPTY.with(key), unmap));
        }
    }

    /// Tags memory again whose pages were mapped anew.
    pub(super) fn tag_again(&self, memory: &Tagged) -> io::Result<()> {
        let locked = self.lock();
        match self.key_of(memory).or(locked.closed) {
            Some(key) => self.tag(memory, key),
            // It has never had a key, and gets its first when it is called.
            None => Ok(()),
        }
    }

    fn tag(&self, memory: &Tagged, key: ProtectionKey) -> io::Result<()> {
        for run in memory.runs().iter() {
            // SAFETY: the pages have one owner, as `Tagged` promises.
            unsafe { self.tagger.tag(run.pages.clone(), run.protection, key) }?;
        }
        Ok(())
    }

    /// Replaces the pages that memory consists of, which its owner has mapped and tagged.
    pub(super) fn set_runs(&self, memory: &Tagged, runs: Box<[Run]>) {
        // The lock that is held across forks.
        let _locked = self.lock();
        *memory.runs() = runs;
    }

    /// Runs a function while no domain has a key. Each domain then learns what the function has done to rights when it
    /// next gets a key. Waits for calls of other threads to end.
    ///
    /// # Errors
    ///
    /// The function's, and [`Error::InDomain`] if the calling thread is itself within a call.
    pub(super) fn while_no_domain_has_a_key(
        &self,
        caller: Caller,
        function: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.lock().withheld_by = caller.number;
        let mut tries = 0u32;
        let result = loop {
            let mut locked = self.lock();
            match locked.take_all_away(caller) {
                Ok(true) => break function(),
                Ok(false) => {}
                Err(error) => break Err(error),
            }
            // Calls may need the lock to end.
            drop(locked);
            pause(tries);
            tries = tries.saturating_add(1);
        };
        self.lock().withheld_by = 0;
        result
    }

    /// Takes a key for memory that is no domain's, until [`give_back`](Self::give_back).
    pub(super) fn take(&self, caller: Option<Caller>) -> Result<ProtectionKey, Error> {
        let mut waiting = Waiting::new();
        loop {
            let mut locked = self.lock();
            if let Some(key) = locked.obtain(None)? {
                self.slots.of(key).claim();
                return Ok(key);
            }
            waiting.go_on(locked, caller)?;
        }
    }

    /// Takes a key as [`take`](Self::take) does, unless too few would be left for domains.
    pub(super) fn take_for_good(&self, caller: Option<Caller>) -> Result<ProtectionKey, Error> {
        let key = self.take(caller)?;
        let mut locked = self.lock();
        match locked.enough_left() {
            Ok(true) => Ok(key),
            result => {
                locked.put_back(key);
                Err(result.err().unwrap_or_else(|| locked.exhausted()))
            }
        }
    }

    /// Gives back a key that [`take`](Self::take) returned and that tags nothing any more.
    pub(super) fn give_back(&self, key: ProtectionKey) {
        self.lock().put_back(key);
    }

    /// Returns the key of memory that no domain may access.
    pub(super) fn closed(&self, caller: Option<Caller>) -> Result<ProtectionKey, Error> {
        if let Some(closed) = self.lock().closed {
            return Ok(closed);
        }
        let key = self.take(caller)?;
        let mut locked = self.lock();
        match locked.closed {
            // Another thread was faster.
            Some(closed) => {
                locked.put_back(key);
                Ok(closed)
            }
            None => {
                locked.closed = Some(key);
                Ok(key)
            }
        }
    }

    pub(super) fn set_limit(&self, limit: usize) {
        self.lock().limit = limit.min(ProtectionKey::COUNT - 1);
    }

    /// Adds a key that the program has allocated and uses no more.
    pub(super) fn hand_in(&self, key: ProtectionKey) {
        let mut locked = self.lock();
        if key != ProtectionKey::DEFAULT && !locked.ours.contains(key) {
            locked.ours.insert(key);
            locked.free.insert(key);
        }
    }

    /// Removes the pin of a call that never ends.
    pub(super) fn abandon(&self, key: ProtectionKey) {
        self.slots.of(key).unpin();
    }
}

/// The wait of one thread for a key.
struct Waiting {
    tries: u32,
}

impl Waiting {
    /// The most tries of a thread that itself pins keys; at 100 microseconds each, half a second.
    const MOST: u32 = 5000;

    const fn new() -> Self {
        Self { tries: 0 }
    }

    /// Waits a little for calls of other threads to end.
    ///
    /// A call of this thread that a signal handler has interrupted, or whose result is being received, cannot end
    /// before this wait does, and other threads may wait for it in turn. So a thread that pins keys waits a limited
    /// time, and not at all if no other thread pins any.
    fn go_on<T: Tagger>(&mut self, locked: Locked<'_, T>, caller: Option<Caller>) -> Result<(), Error> {
        if let Some(caller) = caller
            && locked.are_pinned_by(caller)
            && (self.tries > Self::MOST || locked.are_only_pinned_by(caller))
        {
            return Err(locked.exhausted());
        }
        drop(locked);
        self.tries = self.tries.saturating_add(1);
        pause(self.tries);
        Ok(())
    }
}

impl<T: Tagger> Locked<'_, T> {
    /// In a forked child, whose thread held this lock in the parent: ends what other threads had begun.
    pub(super) fn after_fork(&mut self, caller: Option<Caller>) {
        self.withheld_by = 0;
        self.releasing = 0;
        for slot in ProtectionKey::all().map(|key| self.table.slots.of(key)) {
            if slot.is_pinned() && !caller.is_some_and(|caller| slot.is_pinned_by(caller)) {
                slot.unpin();
            }
        }
    }

    /// Gives memory without a key one; `false` if calls pin all of them.
    fn give(&mut self, memory: &Arc<Tagged>, want: Option<ProtectionKey>, caller: Caller) -> Result<bool, Error> {
        // The thread that withholds keys waits for the running calls to end. Those may need further keys for that.
        let is_withheld = self.withheld_by != 0 && self.withheld_by != caller.number;
        if is_withheld && !self.are_pinned_by(caller) {
            return Ok(false);
        }
        let Some(key) = self.obtain(want)? else { return Ok(false) };
        if let Err(error) = self.table.tag(memory, key) {
            self.taint(memory, key);
            return Err(Error::system("give a domain's memory a protection key")(error));
        }
        // No page carries those any more.
        let tainted = self.take_tainted(memory).without(key);
        self.put_back_all(tainted);
        self.table.set_slot(memory, self.table.slots.of(key));
        self.owners[key.index()] = Some(memory.clone());
        self.table.slots.note_change();
        Ok(true)
    }

    /// Finds a key that tags nothing, or makes one so; `None` if calls pin all of them. What fails on the way is an error
    /// only if there is no other way.
    fn obtain(&mut self, want: Option<ProtectionKey>) -> Result<Option<ProtectionKey>, Error> {
        let mut failure = self.clear_remains().err();
        if let Some(want) = want {
            if self.closed == Some(want) {
                return Err(self.exhausted());
            }
            if !self.free.contains(want) {
                if self.owners[want.index()].is_none() && self.releasing == 0 {
                    // Something other than a domain has it.
                    return Err(failure.unwrap_or_else(|| self.exhausted()));
                }
                if !self.take_away(want)? {
                    return Ok(None);
                }
            }
            self.free.remove(want);
            return Ok(Some(want));
        }
        if self.free.is_empty() {
            // The last one is kept for closed memory.
            let kept = usize::from(self.closed.is_none() && !self.ours.is_empty());
            if self.ours.len() + kept < self.limit {
                failure = self.allocate().err().or(failure);
            }
        }
        let mut is_pinned = false;
        if self.free.is_empty() {
            failure = self.provide_closed().err().or(failure);
            let mut owned: Vec<_> = self.owned().collect();
            // Without a closed key, one of the keys in use would become it.
            if owned.len() < 2 && self.closed.is_none() {
                owned.clear();
            }
            owned.sort_by_key(|key| self.table.slots.of(*key).last_used());
            for key in owned {
                match self.take_away(key) {
                    Ok(true) => break,
                    Ok(false) => is_pinned |= self.owners[key.index()].is_some(),
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
        }
        match self.free.first() {
            Some(key) => {
                self.free.remove(key);
                Ok(Some(key))
            }
            None if is_pinned || self.releasing != 0 => Ok(None),
            None => Err(failure.unwrap_or_else(|| self.exhausted())),
        }
    }

    /// Tries again what has failed.
    ///
    /// # Errors
    ///
    /// The failure, if memory cannot be tagged yet.
    fn clear_remains(&mut self) -> Result<(), Error> {
        let mut result = Ok(());
        for mut remains in mem::take(&mut self.remains) {
            let cleared = match remains.memory() {
                Some(memory) => self.close_tainted(&memory, remains.keys),
                None => Ok(remains.unmap().then_some(remains.keys)),
            };
            match cleared {
                Ok(Some(keys)) => {
                    self.put_back_all(keys);
                    self.done.push(remains);
                    continue;
                }
                Ok(None) => {}
                Err(error) => result = Err(Error::system("take a domain's protection key away")(error)),
            }
            self.remains.push(remains);
        }
        result
    }

    /// Gives memory the closed key, some pages of which may carry others. Returns those that tag nothing any more.
    fn close_tainted(&mut self, memory: &Tagged, tainted: KeySet) -> io::Result<Option<KeySet>> {
        // Without a closed key one of these becomes it: no other memory carries it.
        let Some(closed) = self.closed.or(tainted.first()) else { return Ok(Some(tainted)) };
        self.table.tag(memory, closed)?;
        self.closed = Some(closed);
        Ok(Some(tainted.without(closed)))
    }

    /// Notes that some pages of memory without a key may carry this one, because tagging them failed half-way.
    fn taint(&mut self, memory: &Arc<Tagged>, key: ProtectionKey) {
        let tainted = self.take_tainted(memory);
        self.remains.push(Remains::of_memory(tainted.with(key), memory.clone()));
    }

    /// Returns the keys that some pages of memory may carry, and forgets that they do.
    fn take_tainted(&mut self, memory: &Tagged) -> KeySet {
        let index = self.remains.iter().position(|remains| remains.is_of(memory));
        index.map_or(KeySet::EMPTY, |index| self.remains.swap_remove(index).keys)
    }

    /// Notes that a key tags nothing any more.
    fn put_back(&mut self, key: ProtectionKey) {
        self.table.slots.of(key).free();
        self.free.insert(key);
    }

    fn put_back_all(&mut self, keys: KeySet) {
        keys.iter().for_each(|key| self.put_back(key));
    }

    fn exhausted(&self) -> Error {
        Error::KeysExhausted { limit: self.ours.len() }
    }

    /// Makes sure that there is a closed key, if one is free or can be allocated.
    fn provide_closed(&mut self) -> Result<(), Error> {
        if self.closed.is_none() && self.free.is_empty() && self.ours.len() < self.limit {
            self.allocate()?;
        }
        if self.closed.is_none() {
            self.closed = self.free.first();
            self.closed.into_iter().for_each(|key| self.free.remove(key));
        }
        Ok(())
    }

    /// Returns whether enough keys are left for domains: one for closed memory, and another.
    fn enough_left(&mut self) -> Result<bool, Error> {
        let _ = self.clear_remains();
        let left = |locked: &Self| {
            locked.owned().count() + locked.free.len() + usize::from(locked.closed.is_some()) + locked.releasing
        };
        while left(self) < 2 && self.ours.len() < self.limit {
            if !self.allocate()? {
                break;
            }
        }
        Ok(left(self) >= 2)
    }

    /// Allocates a key, if the system has one left.
    fn allocate(&mut self) -> Result<bool, Error> {
        let key = self.table.tagger.allocate().map_err(|error| match error.raw_os_error() {
            Some(errno @ (libc::EPERM | libc::EACCES | libc::ENOSYS)) => Error::KeysRefused { errno },
            _ => Error::system("allocate a protection key")(error),
        })?;
        if let Some(key) = key {
            self.ours.insert(key);
            self.free.insert(key);
        }
        Ok(key.is_some())
    }

    /// Closes the memory that has a key, so that the key tags nothing; `false` if a call pins it or no memory has it.
    fn take_away(&mut self, key: ProtectionKey) -> Result<bool, Error> {
        let Some(owner) = self.owners[key.index()].clone() else { return Ok(false) };
        let slot = self.table.slots.of(key);
        if !slot.claim_from(owner.number) {
            return Ok(false);
        }
        let Some(closed) = self.closed else {
            // There is no other: this key becomes the closed one, with the memory that it tags.
            self.closed = Some(key);
            self.detach(key, &owner);
            return Ok(false);
        };
        if let Err(error) = self.table.tag(&owner, closed) {
            // Back to the key that it had, or to none.
            if self.table.tag(&owner, key).is_ok() {
                slot.give(owner.number);
            } else {
                self.taint(&owner, key);
                self.detach(key, &owner);
            }
            return Err(Error::system("take a domain's protection key away")(error));
        }
        self.detach(key, &owner);
        self.put_back(key);
        Ok(true)
    }

    /// The keys that domains have.
    pub(super) fn owned(&self) -> impl Iterator<Item = ProtectionKey> {
        ProtectionKey::all().filter(|key| self.owners[key.index()].is_some())
    }

    /// Returns whether a call of this thread pins a key.
    pub(super) fn are_pinned_by(&self, caller: Caller) -> bool {
        self.owned().any(|key| self.table.slots.of(key).is_pinned_by(caller))
    }

    /// Returns whether calls of this thread pin every key that a domain has.
    fn are_only_pinned_by(&self, caller: Caller) -> bool {
        self.releasing == 0 && self.owned().all(|key| self.table.slots.of(key).is_pinned_by(caller))
    }

    /// Takes the keys of all domains away; `false` if calls pin some.
    fn take_all_away(&mut self, caller: Caller) -> Result<bool, Error> {
        let _ = self.clear_remains();
        // Without one, the first of the keys in use becomes it.
        let _ = self.provide_closed();
        let owned: Vec<_> = self.owned().collect();
        for key in &owned {
            if self.table.slots.of(*key).is_pinned_by(caller) {
                return Err(Error::InDomain);
            }
            self.take_away(*key)?;
        }
        Ok(owned.is_empty())
    }

    fn detach(&mut self, key: ProtectionKey, owner: &Tagged) {
        self.table.set_slot(owner, self.table.slots.none());
        self.owners[key.index()] = None;
        self.table.slots.note_change();
    }
}
