//! The life of a domain, the same on every platform.
//!
//! ```text
//! new ──▶ ready ──── enter ───▶ running
//!          ▲ ▲                   │   │
//!          │ └────── return ─────┘   │ trap
//!          │                         ▼
//!        prepare ◀── discard ◀── violated
//! ```
//!
//! A discard costs more than the rewind itself, and so waits until the domain is entered again, or is asked for.
//!
//! A [`Platform`] provides keys, tagged memory and a gate: page tables and an interrupt descriptor table in a kernel,
//! system calls and signals on Linux, vectors and plain calls in a host test.

use core::fmt;
use core::mem::ManuallyDrop;

use crate::{AccessRights, KeyRights, ProtectionKey};

/// What a domain needs of the system it lives in.
///
/// # Safety
///
/// [`Domain::enter`] is sound only if the platform keeps what its methods promise: a key belongs to one domain at a
/// time, all pages of a domain's memory carry its key while a lease of it exists, and `enter` ends with the caller's
/// rights in force.
pub unsafe trait Platform {
    /// The memory of one domain.
    type Memory;
    /// A record of a trap.
    type Trap;
    /// Why there is no key or no memory.
    type Error;
    /// Who enters a domain, such as a thread; `()` if the platform need not know.
    type Caller: Copy;
    /// Proof that a domain's memory carries its key. The domain keeps the key until the lease is dropped; `()` if it
    /// keeps its key for life.
    type Lease;

    /// Maps a domain's memory, zeroed, with guard pages around the stack.
    ///
    /// # Errors
    ///
    /// If there is no key, or no memory of these sizes. Nothing is left behind then.
    fn map(&self, sizes: Sizes) -> Result<Self::Memory, Self::Error>;

    /// Gives the memory its key, for use by this caller, until the lease is dropped.
    ///
    /// # Errors
    ///
    /// If there is no key.
    fn acquire(&self, memory: &mut Self::Memory, caller: Self::Caller) -> Result<Self::Lease, Self::Error>;

    /// Makes fresh memory ready to run in, or makes it ready again after [`discard`](Self::discard). It is called
    /// while a lease of the memory exists.
    ///
    /// # Errors
    ///
    /// If a resource that this needs is exhausted.
    fn prepare(&self, memory: &mut Self::Memory) -> Result<(), Self::Error>;

    /// Runs `entry` in the domain.
    ///
    /// # Errors
    ///
    /// The trap that ended the call.
    ///
    /// # Safety
    ///
    /// As for [`Gate::enter`](crate::gate::Gate::enter), except for what this platform provides. The lease is of this
    /// memory.
    unsafe fn enter(
        &self,
        memory: &mut Self::Memory,
        lease: &Self::Lease,
        entry: Entry,
        argument: u64,
    ) -> Result<u64, Self::Trap>;

    /// Drops everything that the memory holds: afterwards it reads as zeros.
    fn discard(&self, memory: &mut Self::Memory);

    /// Unmaps the memory, so that no page carries its key any more, and gives the key back.
    fn unmap(&self, memory: Self::Memory);
}

/// A function that runs in a domain: it takes one word and returns one.
pub type Entry = unsafe extern "C" fn(u64) -> u64;

/// The sizes of a domain's memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// The stack.
    pub stack: usize,
    /// The heap.
    pub heap: usize,
}

/// The rights of a domain under the default policy: it reads everything under key 0, and writes only what carries its
/// own key.
#[must_use]
pub const fn default_rights(own: ProtectionKey) -> KeyRights {
    KeyRights::NONE.with(ProtectionKey::DEFAULT, AccessRights::READ_ONLY).with(own, AccessRights::READ_WRITE)
}

/// A domain on a platform.
pub struct Domain<P: Platform> {
    platform: P,
    memory: ManuallyDrop<P::Memory>,
    state: State,
}

/// Where a domain is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// It can be entered.
    Ready,
    /// Code is running in it, or was when its call was abandoned.
    Running,
    /// A violation ended a call. Its memory holds what that left, and is discarded before anything runs in it again.
    Violated,
    /// Its memory holds nothing, and is prepared before the next call.
    Discarded,
}

/// Why a call gave no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure<T, E> {
    /// A trap ended it.
    Trap(T),
    /// The domain could not be made ready; nothing ran.
    NotReady(E),
}

impl<P: Platform> Domain<P> {
    /// Creates a domain. Its memory is made ready when it is first entered.
    ///
    /// # Errors
    ///
    /// The platform's, if there is no key or no memory. Nothing is left behind then.
    pub fn new(platform: P, sizes: Sizes) -> Result<Self, P::Error> {
        let memory = ManuallyDrop::new(platform.map(sizes)?);
        Ok(Self { platform, memory, state: State::Discarded })
    }

    /// Gives the domain its key, for calls by this caller, until the lease is dropped.
    ///
    /// # Errors
    ///
    /// The platform's, if there is no key.
    #[inline]
    pub fn acquire(&mut self, caller: P::Caller) -> Result<P::Lease, P::Error> {
        self.platform.acquire(&mut self.memory, caller)
    }

    /// Calls `entry` with `argument` in the domain, and returns the word that it returned.
    ///
    /// If a trap ends the call, everything that the domain's memory held is gone before the next call.
    ///
    /// # Errors
    ///
    /// The trap, or why the domain could not be made ready.
    ///
    /// # Safety
    ///
    /// As for [`Gate::enter`](crate::gate::Gate::enter), except for what the platform provides. The lease is of this
    /// domain.
    #[inline]
    pub unsafe fn enter(
        &mut self,
        lease: &P::Lease,
        entry: Entry,
        argument: u64,
    ) -> Result<u64, Failure<P::Trap, P::Error>> {
        if self.state != State::Ready {
            self.make_ready().map_err(Failure::NotReady)?;
        }
        // SAFETY: the caller answers for the lease and the entry point.
        unsafe { self.run(lease, entry, argument) }
    }

    /// Notes that the word which [`enter`](Self::enter) returned was not the end of the call, but a
    /// [suspension](crate::gate::suspend). The call goes on with [`resume`](Self::resume); if it never does, everything
    /// that the domain's memory held is gone before the next call.
    pub fn suspended(&mut self) {
        self.state = State::Running;
    }

    /// Goes on with a call that is suspended.
    ///
    /// # Errors
    ///
    /// The trap.
    ///
    /// # Panics
    ///
    /// If no call is suspended.
    ///
    /// # Safety
    ///
    /// As for [`enter`](Self::enter); and `entry` takes up the stack of the suspended call.
    pub unsafe fn resume(
        &mut self,
        lease: &P::Lease,
        entry: Entry,
        argument: u64,
    ) -> Result<u64, Failure<P::Trap, P::Error>> {
        assert_eq!(self.state, State::Running, "no call is suspended");
        // SAFETY: the caller answers for the lease and the entry point; the memory was ready when the call began.
        unsafe { self.run(lease, entry, argument) }
    }

    #[inline]
    unsafe fn run(&mut self, lease: &P::Lease, entry: Entry, argument: u64) -> Result<u64, Failure<P::Trap, P::Error>> {
        self.state = State::Running;
        // SAFETY: the caller answers for the lease and the entry point; the memory is ready.
        match unsafe { self.platform.enter(&mut self.memory, lease, entry, argument) } {
            Ok(value) => {
                self.state = State::Ready;
                Ok(value)
            }
            Err(trap) => {
                self.state = State::Violated;
                Err(Failure::Trap(trap))
            }
        }
    }

    /// Drops everything that the domain's memory holds.
    pub fn discard(&mut self) {
        self.platform.discard(&mut self.memory);
        self.state = State::Discarded;
    }

    /// Returns where the domain is in its life.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Returns the domain's memory. What it holds is hostile.
    #[must_use]
    #[inline]
    pub fn memory(&self) -> &P::Memory {
        &self.memory
    }

    /// Returns the domain's memory, to change what the platform keeps with it between calls.
    #[must_use]
    #[inline]
    pub fn memory_mut(&mut self) -> &mut P::Memory {
        &mut self.memory
    }

    /// Has everything that the domain's memory holds dropped before it is entered again.
    pub fn discard_later(&mut self) {
        if self.state == State::Ready {
            self.state = State::Violated;
        }
    }

    /// Returns the platform.
    #[must_use]
    pub const fn platform(&self) -> &P {
        &self.platform
    }

    #[cold]
    fn make_ready(&mut self) -> Result<(), P::Error> {
        // Running: a call was abandoned, by a panic of the platform, and nothing is known of the memory.
        if matches!(self.state, State::Violated | State::Running) {
            self.discard();
        }
        self.platform.prepare(&mut self.memory)?;
        self.state = State::Ready;
        Ok(())
    }
}

impl<P: Platform> Drop for Domain<P> {
    fn drop(&mut self) {
        // SAFETY: the field is not used after this.
        let memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        self.platform.unmap(memory);
    }
}

impl<P: Platform> fmt::Debug for Domain<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocator::{KeyAllocator, KeyError};
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;
    use std::vec;
    use std::vec::Vec;

    /// A platform of plain memory, where an entry point that returns `TRAP` stands for one that traps.
    #[derive(Clone, Default)]
    struct Host {
        keys: Rc<RefCell<KeyAllocator>>,
        mapped: Rc<Cell<usize>>,
        fail_prepare: Rc<Cell<bool>>,
    }

    const TRAP: u64 = u64::MAX;
    const LIMIT: usize = 1 << 20;

    struct Memory {
        key: ProtectionKey,
        bytes: Vec<u8>,
        prepared: u32,
        /// Leases are clones of it.
        lease: Rc<()>,
    }

    // SAFETY: there is no isolation to break.
    unsafe impl Platform for Host {
        type Memory = Memory;
        type Trap = &'static str;
        type Error = KeyError;
        type Caller = ();
        type Lease = Rc<()>;

        fn map(&self, sizes: Sizes) -> Result<Memory, KeyError> {
            if sizes.heap > LIMIT {
                return Err(KeyError::NotFree { key: ProtectionKey::DEFAULT });
            }
            let key = self.keys.borrow_mut().allocate()?;
            self.mapped.set(self.mapped.get() + 1);
            Ok(Memory { key, bytes: vec![0; sizes.stack + sizes.heap], prepared: 0, lease: Rc::new(()) })
        }

        fn acquire(&self, memory: &mut Memory, (): ()) -> Result<Rc<()>, KeyError> {
            Ok(memory.lease.clone())
        }

        fn prepare(&self, memory: &mut Memory) -> Result<(), KeyError> {
            assert!(Rc::strong_count(&memory.lease) > 1, "there is a lease");
            if self.fail_prepare.get() {
                return Err(KeyError::Exhausted { limit: 0 });
            }
            assert!(memory.bytes.iter().all(|byte| *byte == 0), "prepared memory is clean");
            memory.prepared += 1;
            Ok(())
        }

        unsafe fn enter(
            &self,
            memory: &mut Memory,
            lease: &Rc<()>,
            entry: Entry,
            argument: u64,
        ) -> Result<u64, &'static str> {
            assert!(Rc::ptr_eq(lease, &memory.lease));
            memory.bytes[0] = 0xff;
            // SAFETY: the tests' entry points do nothing unsafe.
            match unsafe { entry(argument) } {
                TRAP => Err("trap"),
                value => Ok(value),
            }
        }

        fn discard(&self, memory: &mut Memory) {
            memory.bytes.fill(0);
        }

        fn unmap(&self, memory: Memory) {
            assert_eq!(Rc::strong_count(&memory.lease), 1, "no lease is left");
            self.mapped.set(self.mapped.get() - 1);
            self.keys.borrow_mut().free(memory.key).unwrap();
        }
    }

    unsafe extern "C" fn same(argument: u64) -> u64 {
        argument
    }

    fn enter(domain: &mut Domain<Host>, argument: u64) -> Result<u64, Failure<&'static str, KeyError>> {
        let lease = domain.acquire(()).map_err(Failure::NotReady)?;
        // SAFETY: `same` does nothing unsafe, and the lease is this domain's.
        unsafe { domain.enter(&lease, same, argument) }
    }

    const SIZES: Sizes = Sizes { stack: 64, heap: 64 };

    #[test]
    fn memory_persists_from_call_to_call_until_a_trap() {
        let mut domain = Domain::new(Host::default(), SIZES).unwrap();
        assert_eq!(enter(&mut domain, 7), Ok(7));
        assert_eq!(domain.memory().bytes[0], 0xff);
        assert_eq!((enter(&mut domain, 8), domain.memory().prepared), (Ok(8), 1));

        assert_eq!(enter(&mut domain, TRAP), Err(Failure::Trap("trap")));
        assert_eq!(domain.state(), State::Violated);
        assert_eq!((enter(&mut domain, 9), domain.memory().prepared), (Ok(9), 2));
    }

    #[test]
    fn a_suspended_call_goes_on_or_is_discarded() {
        let mut domain = Domain::new(Host::default(), SIZES).unwrap();
        assert_eq!(enter(&mut domain, 7), Ok(7));
        domain.suspended();
        let lease = domain.acquire(()).unwrap();
        // SAFETY: `same` does nothing unsafe, and the lease is this domain's.
        assert_eq!(unsafe { domain.resume(&lease, same, 8) }, Ok(8));
        drop(lease);
        assert_eq!((domain.state(), domain.memory().prepared), (State::Ready, 1));
        domain.suspended();
        assert_eq!(domain.state(), State::Running);
        assert_eq!((enter(&mut domain, 9), domain.memory().prepared), (Ok(9), 2), "it was abandoned");
    }

    #[test]
    #[should_panic(expected = "no call is suspended")]
    fn a_call_that_is_not_suspended_is_not_resumed() {
        // No destructor of the platform runs: a lease is left.
        let mut domain = ManuallyDrop::new(Domain::new(Host::default(), SIZES).unwrap());
        let lease = domain.acquire(()).unwrap();
        // SAFETY: `same` does nothing unsafe, and the lease is this domain's.
        let _ = unsafe { domain.resume(&lease, same, 1) };
    }

    #[test]
    fn a_discard_can_wait_for_the_next_call() {
        let mut domain = Domain::new(Host::default(), SIZES).unwrap();
        domain.discard_later();
        assert_eq!(enter(&mut domain, 1), Ok(1));
        domain.discard_later();
        assert_eq!(domain.memory().bytes[0], 0xff);
        assert_eq!((enter(&mut domain, 2), domain.memory().prepared), (Ok(2), 2));
    }

    #[test]
    fn keys_and_memory_come_back() {
        let host = Host::default();
        for _ in 0..100 {
            let mut domain = Domain::new(host.clone(), SIZES).unwrap();
            let _ = enter(&mut domain, TRAP);
        }
        assert_eq!((host.mapped.get(), host.keys.borrow().available()), (0, 15));
    }

    #[test]
    fn a_domain_that_cannot_be_made_leaves_nothing_behind() {
        let host = Host::default();
        let too_big = Sizes { heap: LIMIT + 1, ..SIZES };
        assert!(Domain::new(host.clone(), too_big).is_err());
        assert_eq!((host.mapped.get(), host.keys.borrow().available()), (0, 15));
    }

    #[test]
    fn a_domain_that_cannot_be_made_ready_again_runs_nothing() {
        let host = Host::default();
        let mut domain = Domain::new(host.clone(), SIZES).unwrap();
        let _ = enter(&mut domain, TRAP);
        host.fail_prepare.set(true);
        assert_eq!(enter(&mut domain, 1), Err(Failure::NotReady(KeyError::Exhausted { limit: 0 })));
        assert_eq!((domain.state(), domain.memory().bytes[0]), (State::Discarded, 0));
        host.fail_prepare.set(false);
        assert_eq!(enter(&mut domain, 2), Ok(2));
    }

    #[test]
    fn the_sixteenth_domain_is_refused() {
        let host = Host::default();
        let domains: Vec<_> = (0..15).map(|_| Domain::new(host.clone(), SIZES).unwrap()).collect();
        let error = Domain::new(host, SIZES).unwrap_err();
        assert_eq!((error, domains.len()), (KeyError::Exhausted { limit: 15 }, 15));
    }
}
