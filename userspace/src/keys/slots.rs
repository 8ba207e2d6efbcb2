//! What each protection key is doing at the moment: the part that calls look at without a lock.

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use pkru::ProtectionKey;
use pkru::gate::{Context, Gate};

use crate::monitor::monitored;
use crate::thread::Thread;

/// What one key is doing. Domains must not be able to write it.
#[repr(align(64))]
pub(super) struct Slot {
    /// The number of the domain that has the key, shifted left by one, and bit 0 if a call pins it. 0: no domain has
    /// it.
    owner: AtomicU64,
    /// The value of [`Slots::epoch`] when it was last pinned.
    used: AtomicU64,
    /// Where the signal stack of the thread begins whose call pinned it last.
    signal_stack: AtomicUsize,
}

/// The slots, and what goes with them.
struct Slots {
    slots: [Slot; ProtectionKey::COUNT],
    /// How often a key has changed hands. A slot that was used since the last time has the newest value.
    epoch: AtomicU64,
    /// The number of the next domain.
    next: AtomicU64,
}

monitored! {
    static SLOTS: Slots = Slots {
        slots: [const { Slot { owner: AtomicU64::new(0), used: AtomicU64::new(0), signal_stack: AtomicUsize::new(0) } };
            ProtectionKey::COUNT],
        epoch: AtomicU64::new(1),
        next: AtomicU64::new(1),
    };
}

/// The number of a domain, which no other has had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number(
    // Shifted left by one, so that it is what an idle slot holds.
    u64,
);

impl Number {
    pub(super) fn next() -> Self {
        Self(SLOTS.next.fetch_add(1, Ordering::Relaxed) << 1)
    }
}

/// Nobody has this number: the slot is changing hands, or its key is for other things than domains.
const CLAIMED: u64 = u64::MAX - 1;

const PINNED: u64 = 1;

impl Slot {
    pub(super) fn of(key: ProtectionKey) -> &'static Self {
        &SLOTS.0.slots[key.index()]
    }

    /// The slot of key 0, which no domain has.
    pub(super) const NONE: &'static Self = &SLOTS.0.slots[0];

    /// Returns the slot's key; `None` for [`NONE`](Self::NONE).
    pub(super) fn key(&'static self) -> Option<ProtectionKey> {
        let distance = ptr::from_ref(self).addr() - SLOTS.slots.as_ptr().addr();
        ProtectionKey::new((distance / size_of::<Self>()) as u8).filter(|key| *key != ProtectionKey::DEFAULT)
    }

    /// Pins the key for a call on this thread, if that domain has it and no call pins it.
    #[inline]
    pub(super) fn pin(&'static self, domain: Number, thread: &Thread) -> Option<Pin> {
        if !self.swap(domain.0, domain.0 | PINNED) {
            return None;
        }
        self.used.store(SLOTS.epoch.load(Ordering::Relaxed), Ordering::Relaxed);
        self.signal_stack.store(thread.signal_stack(), Ordering::Relaxed);
        Some(Pin { slot: self, domain })
    }

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

    /// Takes the key from whoever has it.
    pub(super) fn claim(&self) {
        self.owner.store(CLAIMED, Ordering::Release);
    }

    /// Notes that nobody has the key.
    pub(super) fn free(&self) {
        self.owner.store(0, Ordering::Release);
    }

    /// Lets the key be taken away, though a call has pinned it.
    pub(super) fn unpin(&self) {
        self.owner.fetch_and(!PINNED, Ordering::Release);
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.owner.load(Ordering::Relaxed) & PINNED != 0
    }

    /// Whether a call of this thread pins the key.
    pub(super) fn is_pinned_by(&self, thread: &Thread) -> bool {
        self.is_pinned() && self.signal_stack.load(Ordering::Relaxed) == thread.signal_stack()
    }

    /// Returns a number that is the higher the later the key was last pinned, to the precision of keys changing hands.
    pub(super) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// Notes that a key has changed hands.
pub(super) fn note_change() {
    SLOTS.epoch.fetch_add(1, Ordering::Relaxed);
}

/// A pinned key, which can be taken away again when this is dropped.
#[must_use]
pub(crate) struct Pin {
    slot: &'static Slot,
    domain: Number,
}

impl Pin {
    pub(crate) fn key(&self) -> ProtectionKey {
        self.slot.key().expect("what can be pinned is a key's slot")
    }
}

impl Drop for Pin {
    #[inline]
    fn drop(&mut self) {
        self.slot.give(self.domain);
    }
}

/// Lets a key be taken away that a call has pinned which will never end: a signal handler has left it by a jump.
pub(crate) fn abandon(key: ProtectionKey) {
    Slot::of(key).unpin();
}

/// Finds the call that runs on the thread whose signal stack a frame lies on: the context, if it is in the domain just
/// now.
pub(crate) fn running_on(frame: usize) -> Option<NonNull<Context>> {
    ProtectionKey::all().find_map(|key| {
        // The context first: a slot keeps the stack of the thread that pinned it last, and another may be pinning it
        // just now. If there is a context, the stack is that of its thread, or by now of a later one, which is not
        // this.
        let context = Gate::Pkru.running_with(key)?;
        fence(Ordering::Acquire);
        let stack = Slot::of(key).signal_stack.load(Ordering::Relaxed);
        Thread::signal_stack_at(stack).contains(&frame).then_some(context)
    })
}
