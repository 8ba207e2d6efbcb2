//! The life cycle of a domain. It is the same on every platform.
//!
//! ```text
//! new ──▶ ready ──── enter ───▶ running
//!          ▲ ▲                   │   │
//!          │ └────── return ─────┘   │ trap
//!          │                         ▼
//!        prepare ◀── discard ◀── violated
//! ```
//!
//! Discarding costs more than rewinding. A violated domain is therefore discarded when it is next entered, or when
//! [`Domain::discard`] is called.
//!
//! A [`Platform`] provides keys, tagged memory and a gate. A kernel implements it with page tables and an interrupt
//! descriptor table, Linux programs with system calls and signals, and the host tests with vectors and plain calls.

use core::fmt;
use core::mem::ManuallyDrop;

use crate::{AccessRights, KeyRights, ProtectionKey};

/// Provides keys, tagged memory and a gate to [`Domain`].
///
/// # Safety
///
/// [`Domain::enter`] relies on the implementation:
///
/// - A key belongs to at most one domain at a time.
/// - While a lease of a domain exists, all pages of its memory carry its key.
/// - When `enter` returns, the caller's rights are in force.
/// - After `discard`, the memory reads as zeros.
pub unsafe trait Platform {
    /// The memory of one domain.
    type Memory;
    /// The record of a trap that ended a call.
    type Trap;
    /// The error of a failed allocation of a key or of memory.
    type Error;
    /// Identifies the caller, such as a thread. `()` if the platform does not need it.
    type Caller: Copy;
    /// Proof that a domain's memory carries its key. The domain keeps the key until the lease is dropped. `()` if a
    /// domain keeps its key for life.
    type Lease;

    /// Maps zeroed memory for a domain, with guard pages around the stack.
    ///
    /// # Errors
    ///
    /// Fails if no key or not enough memory is available. Everything allocated so far is freed.
    fn map(&self, sizes: Sizes) -> Result<Self::Memory, Self::Error>;

    /// Tags the memory with a key for calls by this caller. The memory keeps the key until the lease is dropped.
    ///
    /// # Errors
    ///
    /// Fails if no key is available.
    fn acquire(&self, memory: &mut Self::Memory, caller: Self::Caller) -> Result<Self::Lease, Self::Error>;

    /// Initializes memory that is new or discarded, so that code can run in it. [`Domain`] calls this while a lease of
    /// the memory exists.
    ///
    /// # Errors
    ///
    /// Fails if a resource that it needs is exhausted.
    fn prepare(&self, memory: &mut Self::Memory) -> Result<(), Self::Error>;

    /// Runs `entry` in the domain.
    ///
    /// # Errors
    ///
    /// Returns the trap that ended the call.
    ///
    /// # Safety
    ///
    /// - The conditions of [`Gate::enter`](crate::gate::Gate::enter) hold, except for those that the platform itself
    ///   meets.
    /// - The lease is of this memory.
    unsafe fn enter(
        &self,
        memory: &mut Self::Memory,
        lease: &Self::Lease,
        entry: Entry,
        argument: u64,
    ) -> Result<u64, Self::Trap>;

    /// Discards the contents of the memory. Afterwards it reads as zeros.
    fn discard(&self, memory: &mut Self::Memory);

    /// Unmaps the memory and then frees its key. No page carries the key when it is freed.
    fn unmap(&self, memory: Self::Memory);
}

/// An entry point: a function that runs in a domain. It takes one 64-bit word and returns one.
pub type Entry = unsafe extern "C" fn(u64) -> u64;

/// The sizes of a domain's memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// The size of the stack.
    pub stack: usize,
    /// The size of the heap.
    pub heap: usize,
}

/// Returns the rights of a domain under the default policy: it reads memory under key 0, reads and writes memory under
/// its own key, and accesses no other.
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

/// The state of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// The domain can be entered.
    Ready,
    /// A call is running or suspended, or a panic of the platform ended it.
    Running,
    /// A violation ended the last call, or [`Domain::discard_later`] was called. The memory is discarded before the
    /// next call.
    Violated,
    /// The memory is new or discarded. It is prepared before the next call.
    Discarded,
}

/// The reason why a call returned no word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure<T, E> {
    /// A trap ended the call.
    Trap(T),
    /// The platform could not prepare the domain. No code ran in it.
    NotReady(E),
}

impl<P: Platform> Domain<P> {
    /// Creates a domain. Its memory is prepared when it is first entered.
    ///
    /// # Errors
    ///
    /// Returns the platform's error if no key or not enough memory is available. Everything allocated so far is freed.
    pub fn new(platform: P, sizes: Sizes) -> Result<Self, P::Error> {
        let memory = ManuallyDrop::new(platform.map(sizes)?);
        Ok(Self { platform, memory, state: State::Discarded })
    }

    /// Tags the domain's memory with a key for calls by this caller. The domain keeps the key until the lease is
    /// dropped.
    ///
    /// # Errors
    ///
    /// Returns the platform's error if no key is available.
    /// # Safety
    ///
    /// The lease is dropped before another of this domain is acquired, and before the domain is dropped.
    #[inline]
    pub unsafe fn acquire(&mut self, caller: P::Caller) -> Result<P::Lease, P::Error> {
        self.platform.acquire(&mut self.memory, caller)
    }

    /// Calls `entry` with `argument` in the domain and returns its result.
    ///
    /// If a trap ends the call, the domain's memory is discarded before the next call.
    ///
    /// # Errors
    ///
    /// - [`Failure::Trap`] if a trap ended the call.
    /// - [`Failure::NotReady`] if the platform could not prepare the domain.
    ///
    /// # Safety
    ///
    /// - The conditions of [`Gate::enter`](crate::gate::Gate::enter) hold, except for those that the platform meets.
    /// - The lease is of this domain.
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
        // SAFETY: the caller meets the contract of `enter`, and the memory is ready.
        unsafe { self.run(lease, entry, argument) }
    }

    /// Marks the call that just returned as [suspended](crate::gate::suspend) and not finished.
    ///
    /// [`resume`](Self::resume) continues it. If the domain is entered instead, its memory is discarded first.
    pub fn suspended(&mut self) {
        self.state = State::Running;
    }

    /// Continues a suspended call.
    ///
    /// # Errors
    ///
    /// [`Failure::Trap`] if a trap ended the call.
    ///
    /// # Panics
    ///
    /// Panics if no call is suspended.
    ///
    /// # Safety
    ///
    /// - The conditions of [`enter`](Self::enter) hold.
    /// - `entry` restores the stack pointer of the suspended call, as [`suspend`](crate::gate::suspend) describes.
    pub unsafe fn resume(
        &mut self,
        lease: &P::Lease,
        entry: Entry,
        argument: u64,
    ) -> Result<u64, Failure<P::Trap, P::Error>> {
        assert_eq!(self.state, State::Running, "no call is suspended");
        // SAFETY: the caller meets the contract of `resume`, and the memory was ready when the call began.
        unsafe { self.run(lease, entry, argument) }
    }

    #[inline]
    unsafe fn run(&mut self, lease: &P::Lease, entry: Entry, argument: u64) -> Result<u64, Failure<P::Trap, P::Error>> {
        self.state = State::Running;
        // SAFETY: the callers of this function meet the contract of `enter`, and the memory is ready.
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

    /// Discards the contents of the domain's memory now.
    pub fn discard(&mut self) {
        self.platform.discard(&mut self.memory);
        self.state = State::Discarded;
    }

    /// Returns the domain's state.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Returns the domain's memory. Its contents are hostile.
    #[must_use]
    #[inline]
    pub fn memory(&self) -> &P::Memory {
        &self.memory
    }

    /// Returns the domain's memory mutably, so that the platform can change its own record of it between calls.
    #[must_use]
    #[inline]
    pub fn memory_mut(&mut self) -> &mut P::Memory {
        &mut self.memory
    }

    /// Discards the contents of the domain's memory before the next call.
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
        // In state `Running` a suspended call was not resumed, or the platform panicked. The memory is in an unknown
        // state.
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
        // SAFETY: the value is being dropped, so nothing uses the field after this.
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

    /// A platform of plain memory. An entry point that returns `TRAP` simulates a trap.
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
        /// Each lease is a clone of it.
        lease: Rc<()>,
    }

    // SAFETY: the tests' entry points touch no memory, so there is nothing to isolate.
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
            assert!(Rc::strong_count(&memory.lease) > 1, "a lease exists");
            if self.fail_prepare.get() {
                return Err(KeyError::Exhausted { limit: 0 });
            }
            assert!(memory.bytes.iter().all(|byte| *byte == 0), "memory is zero before it is prepared");
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
            assert_eq!(Rc::strong_count(&memory.lease), 1, "no lease exists");
            self.mapped.set(self.mapped.get() - 1);
            self.keys.borrow_mut().free(memory.key).unwrap();
        }
    }

    unsafe extern "C" fn same(argument: u64) -> u64 {
        argument
    }

    fn enter(domain: &mut Domain<Host>, argument: u64) -> Result<u64, Failure<&'static str, KeyError>> {
        // SAFETY: it is dropped when this function returns.
        let lease = unsafe { domain.acquire(()) }.map_err(Failure::NotReady)?;
        // SAFETY: `same` does nothing unsafe, and the lease is this domain's.
        unsafe { domain.enter(&lease, same, argument) }
    }

    const SIZES: Sizes = Sizes { stack: 64, heap: 64 };

    #[test]
    fn memory_persists_between_calls_until_a_trap() {
        let mut domain = Domain::new(Host::default(), SIZES).unwrap();
        assert_eq!(enter(&mut domain, 7), Ok(7));
        assert_eq!(domain.memory().bytes[0], 0xff);
        assert_eq!((enter(&mut domain, 8), domain.memory().prepared), (Ok(8), 1));

        assert_eq!(enter(&mut domain, TRAP), Err(Failure::Trap("trap")));
        assert_eq!(domain.state(), State::Violated);
        assert_eq!((enter(&mut domain, 9), domain.memory().prepared), (Ok(9), 2));
    }

    #[test]
    fn a_suspended_call_is_resumed_or_discarded() {
        let mut domain = Domain::new(Host::default(), SIZES).unwrap();
        assert_eq!(enter(&mut domain, 7), Ok(7));
        domain.suspended();
        // SAFETY: it is the only one, and dropped before the domain is, if that is.
        let lease = unsafe { domain.acquire(()) }.unwrap();
        // SAFETY: `same` does nothing unsafe, and the lease is this domain's.
        assert_eq!(unsafe { domain.resume(&lease, same, 8) }, Ok(8));
        drop(lease);
        assert_eq!((domain.state(), domain.memory().prepared), (State::Ready, 1));
        domain.suspended();
        assert_eq!(domain.state(), State::Running);
        assert_eq!((enter(&mut domain, 9), domain.memory().prepared), (Ok(9), 2), "the suspended call was discarded");
    }

    #[test]
    #[should_panic(expected = "no call is suspended")]
    fn resume_panics_if_no_call_is_suspended() {
        // Dropping the domain would fail in `unmap`, because the lease still exists then.
        let mut domain = ManuallyDrop::new(Domain::new(Host::default(), SIZES).unwrap());
        // SAFETY: it is the only one, and dropped before the domain is, if that is.
        let lease = unsafe { domain.acquire(()) }.unwrap();
        // SAFETY: `same` does nothing unsafe, and the lease is this domain's.
        let _ = unsafe { domain.resume(&lease, same, 1) };
    }

    #[test]
    fn discard_later_discards_before_the_next_call() {
        let mut domain = Domain::new(Host::default(), SIZES).unwrap();
        domain.discard_later();
        assert_eq!(enter(&mut domain, 1), Ok(1));
        domain.discard_later();
        assert_eq!(domain.memory().bytes[0], 0xff);
        assert_eq!((enter(&mut domain, 2), domain.memory().prepared), (Ok(2), 2));
    }

    #[test]
    fn dropping_a_domain_frees_its_key_and_memory() {
        let host = Host::default();
        for _ in 0..100 {
            let mut domain = Domain::new(host.clone(), SIZES).unwrap();
            let _ = enter(&mut domain, TRAP);
        }
        assert_eq!((host.mapped.get(), host.keys.borrow().available()), (0, 15));
    }

    #[test]
    fn a_failed_creation_leaks_neither_key_nor_memory() {
        let host = Host::default();
        let too_big = Sizes { heap: LIMIT + 1, ..SIZES };
        assert!(Domain::new(host.clone(), too_big).is_err());
        assert_eq!((host.mapped.get(), host.keys.borrow().available()), (0, 15));
    }

    #[test]
    fn no_code_runs_if_prepare_fails() {
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
    fn creating_a_sixteenth_domain_fails() {
        let host = Host::default();
        let domains: Vec<_> = (0..15).map(|_| Domain::new(host.clone(), SIZES).unwrap()).collect();
        let error = Domain::new(host, SIZES).unwrap_err();
        assert_eq!((error, domains.len()), (KeyError::Exhausted { limit: 15 }, 15));
    }
}
