//! The record of a thread that enters domains.

#![expect(unsafe_code, reason = "it follows the pointer to the current record")]

use std::cell::{Cell, OnceCell};
use std::ffi::c_int;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use pkru::ProtectionKey;

use crate::Error;
use crate::keys::{self, Caller, SIGNAL_STACK_SIZE};
use crate::memory::mapping::Mapping;
use crate::sys::{self, AlternateStack};
use crate::trusted::trusted;

thread_local! {
    /// This thread's record; null until it is ready. A domain's own copy is null.
    static CURRENT: Cell<*const Thread> = const { Cell::new(ptr::null()) };
}

trusted! {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    /// The number of the signal stacks' key, 0 if they have key 0.
    static SIGNAL_STACK_KEY: AtomicU8 = AtomicU8::new(0);
}

/// Returns the key of the signal stacks, if it is not key 0.
///
/// Before Linux 6.12 the kernel writes a signal's frame with the rights of the interrupted domain. There the signal
/// stacks have a key that every domain may write.
pub(crate) fn signal_stack_key() -> Option<ProtectionKey> {
    ProtectionKey::new(SIGNAL_STACK_KEY.load(Ordering::Relaxed)).filter(|key| *key != ProtectionKey::DEFAULT)
}

/// Sets the key of the signal stacks.
pub(crate) fn set_signal_stack_key(key: ProtectionKey) {
    SIGNAL_STACK_KEY.store(key.number(), Ordering::Relaxed);
}

/// A thread that enters domains.
#[derive(Debug)]
pub(crate) struct Thread {
    /// A number that no other thread of the process has had.
    number: u64,
    /// The kernel's number of the thread. In a copy of the process the thread has another.
    id: Cell<c_int>,
    /// The addresses of the thread's own stack, once they are found.
    own_stack: OnceCell<Range<usize>>,
    /// Where signals are taken. The kernel knows no other alternate stack of this thread.
    stack: Mapping<1>,
    /// The alternate stack that the program has set.
    programs_stack: Cell<AlternateStack>,
    /// The timer that ends calls at their deadline, once there was one.
    timer: Cell<Option<sys::Timer>>,
    /// The program's signal handlers that are running, one within the other, the outermost first.
    handlers: [Cell<Handler>; Self::MOST_HANDLERS],
    /// How many of them there are. Those beyond the array are only counted.
    depth: Cell<usize>,
}

/// One of the program's signal handlers that is running.
#[derive(Debug, Clone, Copy, Default)]
struct Handler {
    /// The program's stack pointer that it has interrupted.
    interrupted: usize,
    /// The stack pointer of the code that called it, on the signal stack.
    here: usize,
    /// The key that the call pins which it has interrupted.
    key: Option<ProtectionKey>,
}

/// Returns the calling thread's record, if it is ready to enter domains.
#[inline]
pub(crate) fn current() -> Option<&'static Thread> {
    // SAFETY: the record lives until the thread ends, and the pointer is reset before that.
    unsafe { CURRENT.get().as_ref() }
}

/// Returns the calling thread as a caller of domains, if it is ready to enter them.
pub(crate) fn current_caller() -> Option<Caller> {
    current().map(Thread::caller)
}

/// Returns the lowest address that the calling code's stack may reach, if this is its stack pointer.
pub(crate) fn stack_limit(pointer: usize) -> usize {
    /// What is left of a stack that is not known, such as a coroutine's.
    const UNKNOWN: usize = 32 * 1024;
    let known = current().and_then(|thread| {
        let stacks = [thread.own_stack(), thread.programs_stack.get().addresses()];
        stacks.into_iter().flatten().find(|stack| stack.contains(&pointer))
    });
    known.map_or(pointer.saturating_sub(UNKNOWN), |stack| stack.start)
}

impl Thread {
    /// Makes a record of the calling thread, with a signal stack that is not installed yet.
    pub(crate) fn new() -> Result<Self, Error> {
        let stack = Mapping::new([SIGNAL_STACK_SIZE])?;
        stack.make_accessible(signal_stack_key().unwrap_or(ProtectionKey::DEFAULT))?;
        Ok(Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            id: Cell::new(sys::thread_id()),
            own_stack: sys::own_stack().map_or_else(OnceCell::new, OnceCell::from),
            stack,
            programs_stack: Cell::new(
                sys::alternate_stack().map_err(Error::system("find the thread's alternate signal stack"))?,
            ),
            timer: Cell::new(None),
            handlers: [const { Cell::new(Handler { interrupted: 0, here: 0, key: None }) }; Self::MOST_HANDLERS],
            depth: Cell::new(0),
        })
    }

    /// Returns the addresses of the thread's own stack, if they can be found. For the first thread that takes a descriptor.
    fn own_stack(&self) -> Option<Range<usize>> {
        self.own_stack.get().cloned().or_else(|| {
            let found = sys::own_stack()?;
            Some(self.own_stack.get_or_init(|| found).clone())
        })
    }

    /// Makes this the calling thread's record.
    pub(crate) fn set_current(&'static self) {
        CURRENT.set(self);
    }

    /// Returns the thread as a caller of domains.
    #[inline]
    pub(crate) fn caller(&self) -> Caller {
        Caller { number: self.number, signal_stack: self.stack.part(0).start }
    }

    /// Returns the start of the thread's own stack, 0 if it is not known.
    pub(crate) fn own_stack_start(&self) -> usize {
        self.own_stack.get().map_or(0, |stack| stack.start)
    }

    /// Returns whether this is the thread itself, and not its copy in a copy of the process.
    pub(crate) fn is_original(&self) -> bool {
        self.id.get() == sys::thread_id()
    }

    /// In a forked child: makes this the program's thread.
    pub(crate) fn after_fork(&self) {
        self.id.set(sys::thread_id());
        // The kernel does not copy timers.
        self.timer.set(None);
    }

    /// The alternate stack that the program has set for this thread.
    pub(crate) const fn programs_stack(&self) -> &Cell<AlternateStack> {
        &self.programs_stack
    }

    /// The timer that ends calls of this thread.
    pub(crate) const fn timer(&self) -> &Cell<Option<sys::Timer>> {
        &self.timer
    }

    /// Sets the alternate stack that the program wants to have.
    pub(crate) fn set_programs_stack(&self, stack: AlternateStack) -> io::Result<()> {
        const KNOWN: i32 = libc::SS_DISABLE | libc::SS_ONSTACK | sys::SS_AUTODISARM;
        if stack.flags & !KNOWN != 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if stack.flags & libc::SS_DISABLE != 0 {
            self.programs_stack.set(AlternateStack::NONE);
        } else if stack.size < libc::MINSIGSTKSZ {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        } else {
            self.programs_stack.set(stack);
        }
        Ok(())
    }

    /// The most nested handlers that are told apart.
    const MOST_HANDLERS: usize = 16;

    /// Begins one of the program's handlers: arms the signal stack below `here`, the stack pointer in use. The kernel
    /// has disarmed it until this signal is over. `interrupted` is the program's stack pointer, and `key` the key that
    /// the interrupted call of a domain pins.
    pub(crate) fn begin_handler(&self, interrupted: usize, here: usize, key: Option<ProtectionKey>) {
        let depth = self.depth.get();
        if let Some(handler) = self.handlers.get(depth) {
            handler.set(Handler { interrupted, here, key });
        }
        self.depth.set(depth + 1);
        self.arm_below(here);
    }

    /// Has signals taken below an address, if it is on the signal stack and there is room.
    fn arm_below(&self, here: usize) {
        /// What the code that calls the handler may still use.
        const MARGIN: usize = 8 * 1024;
        /// A smaller stack is of no use.
        const LEAST: usize = 32 * 1024;
        let stack = self.stack.part(0);
        if stack.contains(&here) && here - MARGIN > stack.start + LEAST {
            // On failure signals are taken on the stack in use.
            let _ = self.install(stack.start..(here - MARGIN) & !15);
        }
    }

    /// Ends a handler.
    pub(crate) fn end_handler(&self) {
        self.depth.set(self.depth.get().saturating_sub(1));
    }

    /// Returns the addresses of the signal stack.
    pub(crate) fn signal_stack(&self) -> Range<usize> {
        self.stack.part(0)
    }

    /// Prepares a jump of the program to a frame with this stack pointer. It may leave handlers, and the calls that
    /// they have interrupted.
    pub(crate) fn before_jump(&self, target: usize) {
        let before = self.depth.get();
        while let Some(last) = self.depth.get().checked_sub(1) {
            let Some(handler) = self.handlers.get(last).map(Cell::get) else { break };
            if handler.interrupted > target {
                break;
            }
            if let Some(key) = handler.key {
                keys::abandon(key);
            }
            self.depth.set(last);
        }
        if self.depth.get() == before {
            return;
        }
        match self.depth.get().checked_sub(1).and_then(|last| self.handlers.get(last)) {
            Some(handler) => self.arm_below(handler.get().here),
            // This fails only on the signal stack itself, which the kernel has disarmed.
            None => drop(self.install_stack()),
        }
    }

    /// Prepares the end of the thread. Returns whether it is in a handler that has interrupted a call.
    pub(crate) fn leave_handlers(&self) -> bool {
        let is_in_handler = self.depth.get() != 0;
        self.before_jump(usize::MAX);
        is_in_handler
    }

    /// The signal stack as the kernel has it while no handler runs.
    pub(crate) fn kernels_stack(&self) -> libc::stack_t {
        let stack = self.stack.part(0);
        AlternateStack { start: stack.start, size: stack.len(), flags: sys::SS_AUTODISARM }.for_kernel()
    }

    /// Sets the signal stack as the alternate stack of the calling thread, which may be running on another one. The caller
    /// blocks every signal.
    pub(crate) fn install_first(&self) -> io::Result<()> {
        // SAFETY: as in `install`.
        unsafe { sys::replace_alternate_stack(self.stack.part(0)) }
    }

    /// Sets the signal stack as the calling thread's alternate stack.
    fn install_stack(&self) -> io::Result<()> {
        self.install(self.stack.part(0))
    }

    fn install(&self, stack: Range<usize>) -> io::Result<()> {
        // SAFETY: the mapping lives until the thread ends, and the destructor first sets another stack.
        unsafe { sys::set_alternate_stack(stack) }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let _ = CURRENT.try_with(|current| current.set(ptr::null()));
        if let Some(timer) = self.timer.get() {
            sys::delete_timer(timer);
        }
        // Restores the program's own stack. This fails only on the signal stack, where no destructor runs.
        let _ = sys::restore_alternate_stack(self.programs_stack.get());
    }
}
