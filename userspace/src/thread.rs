//! What a thread needs before it enters a domain: no restartable sequences, an alternate signal stack, the signals of
//! faults unblocked.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use pkru::registers::Pkru;
use pkru::{AccessRights, ProtectionKey};

use crate::mapping::Mapping;
use crate::monitor::monitored;
use crate::process::Process;
use crate::sys::{self, AlternateStack};
use crate::{Error, keys, signal, tls};

thread_local! {
    /// This thread's record; null until it is ready. A domain's own copy is null.
    static CURRENT: Cell<*const Thread> = const { Cell::new(ptr::null()) };
}

monitored! { static NEXT: AtomicU64 = AtomicU64::new(1); }

/// A thread that can enter domains.
#[derive(Debug)]
pub(crate) struct Thread {
    /// A number that no other thread of the process has had.
    number: u64,
    /// The kernel's number of the thread; in a copy of the process it has another.
    id: Cell<c_int>,
    /// Where signals are taken. The kernel knows no other alternate stack of this thread.
    stack: Mapping<1>,
    /// The alternate stack that the program has set.
    programs_stack: Cell<AlternateStack>,
    /// The timer that ends calls which take too long, once there was one.
    timer: Cell<Option<sys::Timer>>,
    /// The program's signal handlers that are running, one within the other, the outermost first.
    handlers: [Cell<Handler>; Self::MOST_HANDLERS],
    /// How many of them there are; those beyond the array are only counted.
    depth: Cell<usize>,
}

/// One of the program's signal handlers that is running.
#[derive(Debug, Clone, Copy, Default)]
struct Handler {
    /// The program's stack pointer that it has interrupted.
    interrupted: usize,
    /// Where the code that has called it stands on the signal stack.
    here: usize,
    /// The key that the call has pinned which it has interrupted.
    key: Option<ProtectionKey>,
}

/// Returns the calling thread's record, if it is ready to enter domains.
#[inline]
pub(crate) fn current() -> Option<&'static Thread> {
    // SAFETY: the record lives until the thread ends, and the pointer is reset before that.
    unsafe { CURRENT.get().as_ref() }
}

/// Makes the calling thread ready to enter domains.
///
/// # Errors
///
/// What the process or the thread lacks; [`Error::InDomain`] in a domain.
#[cold]
pub(crate) fn make_ready() -> Result<&'static Thread, Error> {
    if tls::is_in_domain() {
        return Err(Error::InDomain);
    }
    let process = Process::get()?;
    if let Some(key) = process.signal_stack_key() {
        // The kernel checks rights when it writes a frame there.
        open(key);
    }
    if let Some(thread) = current() {
        return Ok(thread);
    }
    sys::unblock(&signal::FAULTS).map_err(Error::system("unblock the signals that faults raise"))?;
    // A handler that calls a domain would make a second record.
    let _quiet = sys::BlockedSignals::new();
    if let Some(thread) = current() {
        return Ok(thread);
    }
    if let Some(area) = sys::rseq_area() {
        sys::unregister_rseq(area).map_err(Error::system("unregister the thread's restartable sequences"))?;
    }
    let stack = Mapping::new([Thread::STACK_SIZE])?;
    stack.open(process.signal_stack_key().unwrap_or(ProtectionKey::DEFAULT))?;
    let programs_stack = sys::alternate_stack();
    let thread = Box::new(Thread {
        number: NEXT.fetch_add(1, Ordering::Relaxed),
        id: Cell::new(sys::thread_id()),
        stack,
        programs_stack: Cell::new(programs_stack),
        timer: Cell::new(None),
        handlers: [const { Cell::new(Handler { interrupted: 0, here: 0, key: None }) }; Thread::MOST_HANDLERS],
        depth: Cell::new(0),
    });
    thread.install(thread.stack.part(0)).map_err(Error::system("set the thread's alternate signal stack"))?;
    let thread = Box::into_raw(thread);
    at_end_of_thread(thread)?;
    CURRENT.set(thread);
    // SAFETY: the record lives until the thread ends.
    Ok(unsafe { &*thread })
}

/// Has the record freed when the calling thread ends, after the destructors of its thread-locals, which may call
/// domains.
fn at_end_of_thread(thread: *const Thread) -> Result<(), Error> {
    monitored! { static KEY: OnceLock<Option<libc::pthread_key_t>> = OnceLock::new(); }
    unsafe extern "C" fn free(thread: *mut c_void) {
        // SAFETY: the record was made by `make_ready`, and this thread is done with it.
        drop(unsafe { Box::from_raw(thread.cast::<Thread>()) });
    }
    let set = KEY.get_or_init(|| sys::thread_key(free)).is_some_and(|key| sys::set_for_thread(key, thread.cast()));
    if set { Ok(()) } else { Err(Error::System { operation: "have a thread's end noticed", errno: libc::EAGAIN }) }
}

/// Returns whether the calling thread has all rights to a key.
#[inline]
pub(crate) fn has_rights(key: ProtectionKey) -> bool {
    // SAFETY: a domain's memory has a key only after the process's capability check has found PKU.
    unsafe { Pkru::assume() }.read().get(key).is_empty()
}

/// Returns whether the rights in force are those of a domain, to which key 0 is read-only.
pub(crate) fn is_a_domains() -> bool {
    !has_rights(ProtectionKey::DEFAULT)
}

/// Returns whether code in a domain asks, as the rights say. What [`tls::is_in_domain`] says code there can change by
/// mistake.
pub(crate) fn is_in_domain() -> bool {
    Process::is_ready() && is_a_domains()
}

/// Gives the calling thread all rights to a key of ours; in a domain, nothing.
#[cold]
pub(crate) fn open(key: ProtectionKey) {
    if is_a_domains() {
        return;
    }
    // SAFETY: the process's capability check has found PKU.
    let register = unsafe { Pkru::assume() };
    // SAFETY: more rights than before forbid nothing, and the key's pages are this crate's, which expects them open
    // here.
    unsafe { register.write(register.read().with(key, AccessRights::READ_WRITE)) };
}

impl Thread {
    /// Room for frames, of which the largest take some 11 KiB, and for handlers that the program wants on no stack of
    /// its own.
    const STACK_SIZE: usize = 256 * 1024;

    /// Returns a number that no other thread of the process has had.
    #[inline]
    pub(crate) const fn number(&self) -> u64 {
        self.number
    }

    /// Whether this is the thread itself, and not what became of it in a copy of the process.
    pub(crate) fn is_original(&self) -> bool {
        self.id.get() == sys::thread_id()
    }

    /// In the child of a fork: this is the program's thread from now on.
    pub(crate) fn adopt(&self) {
        self.id.set(sys::thread_id());
        // The kernel does not copy timers.
        self.timer.set(None);
    }

    /// Returns where the signal stack begins.
    #[inline]
    pub(crate) fn signal_stack(&self) -> usize {
        self.stack.part(0).start
    }

    /// Returns the addresses of a signal stack that begins there.
    pub(crate) fn signal_stack_at(start: usize) -> Range<usize> {
        start..start + Self::STACK_SIZE
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

    /// The most handlers within each other that are told apart.
    const MOST_HANDLERS: usize = 16;

    /// Before one of the program's handlers runs, with `here` the stack in use: lets further signals be taken below.
    /// The kernel has switched the signal stack off until this one is over. `interrupted` is the program's stack
    /// pointer, and `key` what the call of a domain has pinned that is interrupted.
    pub(crate) fn begin_handler(&self, interrupted: usize, here: usize, key: Option<ProtectionKey>) {
        let depth = self.depth.get();
        if let Some(handler) = self.handlers.get(depth) {
            handler.set(Handler { interrupted, here, key });
        }
        self.depth.set(depth + 1);
        self.arm_below(here);
    }

    /// Lets signals be taken below an address, if it is on the signal stack and there is room.
    fn arm_below(&self, here: usize) {
        /// What the code that calls the handler may still use.
        const MARGIN: usize = 8 * 1024;
        /// Less than this is no use.
        const LEAST: usize = 32 * 1024;
        let stack = self.stack.part(0);
        if stack.contains(&here) && here - MARGIN > stack.start + LEAST {
            // If it fails, signals are taken on the stack in use, as they would be without this.
            let _ = self.install(stack.start..(here - MARGIN) & !15);
        }
    }

    /// After it.
    pub(crate) fn end_handler(&self) {
        self.depth.set(self.depth.get().saturating_sub(1));
    }

    /// Before a jump to another frame of the program: it may leave handlers, and the calls that they have interrupted.
    pub(crate) fn jumping(&self, target: usize) {
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
            // It fails only on the signal stack itself, which the kernel has switched off.
            None => drop(self.install(self.stack.part(0))),
        }
    }

    /// The signal stack as the kernel has it where no handler runs.
    pub(crate) fn kernels_stack(&self) -> libc::stack_t {
        let stack = self.stack.part(0);
        AlternateStack { start: stack.start, size: stack.len(), flags: sys::SS_AUTODISARM }.for_kernel()
    }

    fn install(&self, stack: Range<usize>) -> io::Result<()> {
        // SAFETY: the region lives until the thread ends, and its destructor takes the stack away first.
        unsafe { sys::set_alternate_stack(stack) }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let _ = CURRENT.try_with(|current| current.set(ptr::null()));
        if let Some(timer) = self.timer.get() {
            sys::delete_timer(timer);
        }
        // The program's own stack is in force again. If that fails the thread is on its stack, which is not the case
        // here.
        let _ = sys::restore_alternate_stack(self.programs_stack.get());
    }
}
