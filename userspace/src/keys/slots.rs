//! The state of each protection key: the part of the table that calls use without a lock.

use std::ptr;

use pkru::ProtectionKey;

use super::caller::Caller;
use super::sync::{AtomicU64, AtomicUsize, Ordering};

/// The state of one key, on a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Slot {
    /// The number of the domain that has the key, shifted left by one, with bit 0 set while a call pins it. 0 if no
    /// domain has the key.
    pub(super) owner: AtomicU64,
    /// The epoch in which it was last pinned.
    pub(super) used: AtomicU64,
    /// The start of the signal stack of the thread that pinned it last.
    pub(super) signal_stack: AtomicUsize,
}

/// The slots of all keys. The slot of key 0, which no domain has, stands for "no key".
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) slots: [Slot; ProtectionKey::COUNT],
    /// How often a key has changed hands, from 1. A slot that was used since the last change has this value.
    pub(super) epoch: AtomicU64,
    /// The number of the next domain, from 1.
    pub(super) next: AtomicU64,
}

/// The number of a domain, which no other domain of the process has had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number(
    // Shifted left by one: what the slot holds while no call pins it.
    u64,
);

/// The owner while a key changes hands, or while it serves something other than a domain.
const CLAIMED: u64 = u64::MAX - 1;

const PINNED: u64 = 1;

impl Slots {
    pub(super) fn next_number(&self) -> Number {
        Number(self.next.fetch_add(1, Ordering::Relaxed) << 1)
    }

    pub(super) fn of(&self, key: ProtectionKey) -> &Slot {
        &self.slots[key.index()]
    }

    pub(super) fn none(&self) -> &Slot {
        self.of(ProtectionKey::DEFAULT)
    }

    /// Returns the key of a slot of these; `None` for [`none`](Self::none).
    pub(super) fn key_of(&self, slot: &Slot) -> Option<ProtectionKey> {
        let distance = ptr::from_ref(slot).addr() - self.slots.as_ptr().addr();
        ProtectionKey::new((distance / size_of::<Slot>()) as u8).filter(|key| *key != ProtectionKey::DEFAULT)
    }

    /// Pins the key of a slot for a call on this thread, if that domain has the key and no call pins it.
    #[inline]
    pub(super) fn pin<'a>(&'a self, slot: &'a Slot, domain: Number, caller: Caller) -> Option<Pin<'a>> {
        if !slot.swap(domain.0, domain.0 | PINNED) {
            return None;
        }
        slot.used.store(self.epoch.load(Ordering::Relaxed), Ordering::Relaxed);
        slot.signal_stack.store(caller.signal_stack, Ordering::Relaxed);
        Some(Pin { slot, domain })
    }

    /// Notes that a key has changed hands.
    pub(super) fn note_change(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }
}

impl Slot {
    #[inline]
    fn swap(&self, from: u64, to: u64) -> bool {
        self.owner.compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Gives the key to a domain.
    #[inline]
    pub(super) fn give(&self, domain: Number) {
        self.owner.store(domain.0, Ordering::Release);
    }

    /// Takes the key from a domain, if no call pins it.
    pub(super) fn claim_from(&self, domain: Number) -> bool {
        self.swap(domain.0, CLAIMED)
    }

    /// Takes the key from its owner.
    pub(super) fn claim(&self) {
        self.owner.store(CLAIMED, Ordering::Release);
    }

    /// Notes that the key has no owner.
    pub(super) fn free(&self) {
        self.owner.store(0, Ordering::Release);
    }

    /// Removes the pin of a call that never ends.
    pub(super) fn unpin(&self) {
        self.owner.fetch_and(!PINNED, Ordering::Release);
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.owner.load(Ordering::Relaxed) & PINNED != 0
    }

    /// Returns whether a call of this thread pins the key.
    pub(super) fn is_pinned_by(&self, caller: Caller) -> bool {
        self.is_pinned() && self.signal_stack.load(Ordering::Relaxed) == caller.signal_stack
    }

    /// Returns the epoch in which the key was last pinned.
    pub(super) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// A pinned key: its domain keeps it until this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Pin<'a> {
    pub(super) slot: &'a Slot,
    domain: Number,
}

impl Drop for Pin<'_> {
    #[inline]
    fn drop(&mut self) {
        self.slot.give(self.domain);
    }
}
