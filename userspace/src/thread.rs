//! What a thread needs before it enters a domain: no restartable sequences, an alternate signal stack, the signals of faults
//! unblocked, rights to the domain's memory.

use std::cell::{Cell, OnceCell};
use std::ops::Range;

use pkru::registers::Pkru;
use pkru::{AccessRights, ProtectionKey};

use crate::process::Process;
use crate::region::Region;
use crate::{Error, signal, sys, tls};

thread_local! {
    /// The thread is ready, but for rights to a domain's key.
    static READY: Cell<bool> = const { Cell::new(false) };
    static SIGNAL_STACK: OnceCell<SignalStack> = const { OnceCell::new() };
    /// The addresses of the signal stack, without a destructor, to be read at each call.
    static STACK_RANGE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// Makes the calling thread ready to enter a domain with this key.
#[inline]
pub(crate) fn make_ready(key: ProtectionKey) -> Result<Range<usize>, Error> {
    // The rights are read and not remembered: a signal handler starts with others.
    if !READY.get() || !has_rights(key) {
        set_up(key)?;
    }
    let (start, end) = STACK_RANGE.get();
    Ok(start..end)
}

#[inline]
fn has_rights(key: ProtectionKey) -> bool {
    // SAFETY: a thread is ready only after the process's capability check has found PKU.
    unsafe { Pkru::assume() }.read().get(key).is_empty()
}

#[cold]
fn set_up(key: ProtectionKey) -> Result<(), Error> {
    // A domain's own copy of `READY` is false, so that its calls come here.
    if tls::is_in_domain() {
        return Err(Error::InDomain);
    }
    let process = Process::get()?;
    if let Some(key) = process.signal_stack_key() {
        open(key);
    }
    if !READY.get() {
        if let Some(area) = sys::rseq_area() {
            sys::unregister_rseq(area).map_err(Error::system("unregister the thread's restartable sequences"))?;
        }
        sys::unblock(&signal::SIGNALS).map_err(Error::system("unblock the signals that faults raise"))?;
        let stack = SignalStack::new(process.signal_stack_key())?;
        stack.install()?;
        let range = stack.0.part(0);
        STACK_RANGE.set((range.start, range.end));
        let mut stack = Some(stack);
        let kept = SIGNAL_STACK.try_with(|own| own.set(stack.take().expect("it is taken once")));
        if kept.is_err() {
            // The thread is ending and calls from a destructor; its stack stays mapped, for nobody will take it away.
            std::mem::forget(stack);
        }
        READY.set(true);
    }
    open(key);
    Ok(())
}

/// Gives the calling thread all rights to a key of ours.
fn open(key: ProtectionKey) {
    // SAFETY: the process's capability check has found PKU.
    let register = unsafe { Pkru::assume() };
    // SAFETY: more rights than before forbid nothing, and the key's pages are this crate's, which expects them open here.
    unsafe { register.write(register.read().with(key, AccessRights::READ_WRITE)) };
}

/// An alternate signal stack with guard pages.
struct SignalStack(Region<1>);

impl SignalStack {
    /// Room for the handlers that were there before, beyond the frame.
    const HANDLERS: usize = 64 * 1024;

    fn new(key: Option<ProtectionKey>) -> Result<Self, Error> {
        let size = sys::minimum_signal_stack() + Self::HANDLERS;
        Region::new([size], key.unwrap_or(ProtectionKey::DEFAULT)).map(Self)
    }

    fn install(&self) -> Result<(), Error> {
        let range = self.0.part(0);
        let stack = sys::AlternateStack { start: std::ptr::NonNull::new(range.start as *mut u8), size: range.len() };
        // SAFETY: the region lives until the thread ends, and its destructor takes the stack away first.
        unsafe { sys::set_alternate_stack(&stack) }.map_err(Error::system("set the thread's alternate signal stack"))
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        READY.set(false);
        // SAFETY: no stack is always a valid choice. If it fails the thread is on that stack, which is not the case here.
        let _ = unsafe { sys::set_alternate_stack(&sys::AlternateStack { start: None, size: 0 }) };
    }
}
