//! Calling into a domain.

#![expect(unsafe_code, reason = "it enters domains and copies their results")]

use std::any::type_name;
use std::sync::Arc;

use pkru::domain::{Domain as Core, Failure};

use super::callback::{self, Callback, CallbackArguments, Callbacks, Suspended};
use super::deadline::{Deadline, DeadlineError};
use super::{Domain, Last};
use crate::Error;
use crate::backend::pku::{MAILBOX, PkuBackend, Trapped};
use crate::inside::callback::Head;
use crate::inside::entry::{self, Call};
use crate::inside::request::RESUME;
use crate::keys::Pin;
use crate::service;
use crate::setup::{self, globals};
use crate::thread::{self, Thread};
use crate::transfer::{DomainMemory, InvalidResult, Transfer};
use crate::violation::{Violation, ViolationKind, classify, is_told_by_its_state};

impl Domain {
    /// Runs a function in the domain and returns its result.
    ///
    /// The function reads what it captures in place, in the caller's memory. It is [`Fn`] because it cannot write there:
    /// writing a `Cell`, a lock or an atomic of the caller's ends in a violation. The result crosses by [`Transfer`]: the
    /// caller copies and checks it. Apart from what vectors and strings hold, a result has at most 4096 bytes.
    /// `docs/when-it-does-not-compile.md` says what to write in place of `&mut` buffers, `FnOnce` and other types.
    ///
    /// Code in a domain cannot:
    ///
    /// - write statics, those of std and the C library included: `println!`, `std::env`, `std::thread::current`,
    ///   `localtime_r`, `strerror` (which gives an `io::Error` its text), `setlocale`, `dlopen` and `pthread_once` end in a
    ///   violation. [`Builder`](super::Builder) has ways out.
    /// - unwind: a panic ends the call, within `catch_unwind` too.
    /// - start threads, which ends in a violation; or processes, set signal handlers, signal other threads and processes,
    ///   and change attributes of the whole process, which fails with `EPERM`.
    /// - unmap, protect or close what is not its own, which fails with `EPERM`. What it maps and opens is gone after a
    ///   discard.
    /// - use the caller's thread-locals: a domain has its own. A captured handle must not index them.
    ///
    /// A mistake shows when memory outside is accessed, or when the heap finds that it is damaged: what the call allocated
    /// and freed is checked before its result is accepted. Other damage to the domain's own heap may end a later call, and
    /// writes within a block or to the stack may show never.
    ///
    /// If calls of other threads use all protection keys, this waits for one of them to end. Within another call, as in a
    /// signal handler, it waits about half a second. A signal handler may call a domain if it may allocate memory at
    /// that point.
    ///
    /// # Examples
    ///
    /// ```
    /// use pkru_userspace::{Domain, ViolationKind};
    ///
    /// # if pkru_userspace::capability::detect().is_err() { return }
    /// let mut domain = Domain::builder("decoder").build().unwrap();
    /// let mut sample = [1, 2, 3];
    /// let output = sample.as_mut_ptr();
    /// match domain.call(|| unsafe { output.write(9) }).map_err(|violation| violation.kind().clone()) {
    ///     Ok(()) => unreachable!("the output buffer is not the domain's"),
    ///     Err(ViolationKind::Key(fault)) => assert_eq!(fault.address, output as u64),
    ///     Err(other) => panic!("{other}"),
    /// }
    /// assert_eq!(sample, [1, 2, 3]);
    /// ```
    ///
    /// # Errors
    ///
    /// The violation, if the code misbehaved; [`Violation`] says what may have changed outside the domain. The next call finds the domain
    /// empty and works; destructors of what lived in the domain do not run. Code in a domain cannot call a domain; it can
    /// ask its caller to by a [callback](Self::call_with).
    #[inline]
    pub fn call<F: Fn() -> R, R: Transfer>(&mut self, function: F) -> Result<R, Violation> {
        const { assert!(size_of::<R::Wire>() <= MAILBOX, "a result of more than 4096 bytes goes in a Vec") };
        const { assert!(align_of::<R::Wire>() <= MAILBOX) };
        if self.has_limits {
            return self.call_with_name(&mut [], |_| function(), type_name::<F>());
        }
        let Some(thread) = thread::current() else {
            return self.call_from_new_thread(function);
        };
        // SAFETY: this call drops it, and no other runs in the domain meanwhile.
        let lease = match unsafe { self.core.acquire(thread.caller()) } {
            Ok(lease) => lease,
            Err(error) => return Err(self.not_ready(error)),
        };
        let mailbox = self.core.memory().mailbox().start;
        let call = Call { function: &function, mailbox };
        // SAFETY: the thread is ready, and the lease is this domain's. What `run` does wrong in the domain is what the
        // domain contains; its result is not trusted. The call's data and what it refers to outlive it, and the domain
        // cannot write them.
        let result = unsafe { self.core.enter(&lease, entry::run::<F, R>, &raw const call as u64) };
        let received = match result {
            Ok(0) => self.receive(mailbox),
            Ok(request) => self.serve(request, &lease, mailbox, type_name::<F>()),
            Err(failure) => Err(self.failed(failure, type_name::<F>())),
        };
        drop(lease);
        received.map_err(|violation| self.report(violation))
    }

    /// Runs a function in the domain that can call back. Each closure in `callbacks` becomes a C function, and the
    /// function gets pointers to these.
    ///
    /// A callback runs as code of the caller, with the caller's rights and on the caller's stack. It may change what it
    /// captures and call other domains. The code in the domain chooses when it runs and with which arguments, which are
    /// not to be trusted: see [`CallbackArguments`]. The pointers are valid during this call only. Code that keeps one and
    /// calls it in a later call ends in a violation, unless that call has as many callbacks.
    ///
    /// # Examples
    ///
    /// ```
    /// use pkru_userspace::Domain;
    ///
    /// # if pkru_userspace::capability::detect().is_err() { return }
    /// let mut domain = Domain::builder("walker").build().unwrap();
    /// let mut seen = Vec::new();
    /// let result = domain.call_with(&mut [&mut |arguments| { seen.push(arguments.word(0)); 7 }], |callbacks| {
    ///     // SAFETY: C code would be handed this pointer, as the type that it expects.
    ///     let visit: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(callbacks[0].pointer()) };
    ///     visit(1) + visit(2)
    /// });
    /// assert_eq!((result.unwrap(), seen), (14, vec![1, 2]));
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`call`](Self::call).
    ///
    /// # Panics
    ///
    /// If a callback panics; the domain is discarded then. If there are more than 64 callbacks.
    pub fn call_with<F: Fn(&[Callback]) -> R, R: Transfer>(
        &mut self,
        callbacks: Callbacks<'_, '_>,
        function: F,
    ) -> Result<R, Violation> {
        self.call_with_name(callbacks, function, type_name::<F>())
    }

    /// Provides the services that a call without callbacks asks for, until it ends.
    #[cold]
    fn serve<R: Transfer>(
        &mut self,
        mut request: u64,
        lease: &Pin,
        mailbox: usize,
        closure: &'static str,
    ) -> Result<R, Violation> {
        while request != 0 {
            self.core.memory().ensure_rights_after_call();
            let Some(reply) = service::provide(request, self.core.memory_mut()) else {
                self.core.discard();
                return Err(self.violation(ViolationKind::Callback));
            };
            self.check()?;
            self.core.suspended();
            // SAFETY: as in `call`; the entry point continues on the domain's stack where the call left it.
            let result = unsafe { self.core.resume(lease, RESUME, &raw const reply as u64) };
            request = result.map_err(|failure| self.failed(failure, closure))?;
        }
        self.receive(mailbox)
    }

    /// Checks after a service that the domain can go on.
    fn check(&mut self) -> Result<(), Violation> {
        self.core.memory().check().map_err(|error| {
            self.core.discard();
            self.violation(ViolationKind::NotReady(error))
        })
    }

    fn call_with_name<F: Fn(&[Callback]) -> R, R: Transfer>(
        &mut self,
        callbacks: Callbacks<'_, '_>,
        function: F,
        name: &'static str,
    ) -> Result<R, Violation> {
        const { assert!(size_of::<R::Wire>() <= MAILBOX, "a result of more than 4096 bytes goes in a Vec") };
        const { assert!(align_of::<R::Wire>() <= MAILBOX) };
        if self.is_retired() {
            return Err(self.violation(ViolationKind::Retired));
        }
        let thread = match setup::thread::make_ready() {
            Ok(thread) => thread,
            Err(error) => return Err(self.not_ready(error)),
        };
        let received = self.run_with(callbacks, function, thread, name);
        if self.limits.transient {
            self.core.discard_later();
        }
        if received.is_ok() {
            self.violations = 0;
        }
        received.map_err(|violation| self.report(violation))
    }

    fn run_with<F: Fn(&[Callback]) -> R, R: Transfer>(
        &mut self,
        callbacks: Callbacks<'_, '_>,
        function: F,
        thread: &Thread,
        name: &'static str,
    ) -> Result<R, Violation> {
        let not_ready = |error, domain: &Self| domain.violation(ViolationKind::NotReady(error));
        let caller = thread.caller();
        // SAFETY: this call drops it, before it acquires the next and before it ends.
        let mut lease = unsafe { self.core.acquire(caller) }.map_err(|error| not_ready(error, self))?;
        let deadline = Deadline::start(self.limits.deadline, thread).map_err(|error| self.violation(error.into()))?;
        let mailbox = self.core.memory().mailbox().start;
        let pointers = callback::pointers(callbacks.len());
        let function = || function(&pointers);
        let call = Call { function: &function, mailbox };
        let head = Head::new(&raw const call as u64, callbacks.len());
        let entry = entry::with_callbacks(&function);
        // SAFETY: as in `call`.
        let mut result = unsafe { self.core.enter(&lease, entry, &raw const head as u64) };
        loop {
            let request = match result {
                Ok(0) => {
                    deadline.pause();
                    return self.receive(mailbox);
                }
                Ok(request) => request,
                Err(failure) => {
                    deadline.pause();
                    return Err(self.failed(failure, name));
                }
            };
            self.core.memory().ensure_rights_after_call();
            // The deadline's timer keeps running. It expires again and again, so that none is missed.
            if let Some(reply) = service::provide(request, self.core.memory_mut()) {
                self.check()?;
                self.core.suspended();
                // SAFETY: as in `call`; the entry point continues on the domain's stack where the call left it.
                result = unsafe { self.core.resume(&lease, RESUME, &raw const reply as u64) };
                continue;
            }
            deadline.pause();
            let Some(suspended) = Suspended::read(request, self.core.memory(), callbacks.len()) else {
                self.core.discard();
                return Err(self.violation(ViolationKind::Callback));
            };
            // The closure may call so many domains that this one's key is needed.
            drop(lease);
            self.core.suspended();
            let value = {
                let mut arguments = CallbackArguments::new(&suspended, self.core.memory_mut(), caller);
                callbacks[suspended.index](&mut arguments)
            };
            lease = self.core.memory_mut().acquire_again(caller).map_err(|error| not_ready(error, self))?;
            if let Err(error) = deadline.go_on() {
                self.core.discard();
                return Err(self.violation(error.into()));
            }
            let reply = suspended.reply(value);
            // SAFETY: as in `call`; the entry point continues on the domain's stack where the call left it.
            result = unsafe { self.core.resume(&lease, RESUME, &raw const reply as u64) };
        }
    }

    #[cold]
    fn call_from_new_thread<F: Fn() -> R, R: Transfer>(&mut self, function: F) -> Result<R, Violation> {
        match setup::thread::make_ready() {
            Ok(_) => self.call(function),
            Err(error) => Err(self.not_ready(error)),
        }
    }

    /// Reads the result that a call has left in the mailbox.
    #[inline]
    fn receive<R: Transfer>(&mut self, mailbox: usize) -> Result<R, Violation> {
        // `from_wire` can panic, and a transient domain is to be discarded all the same.
        let core = DiscardedLater(&mut self.core);
        core.0.memory().ensure_rights_after_call();
        let ranges = core.0.memory().readable();
        let memory = DomainMemory::new(&ranges, thread::stack_limit);
        let received = memory.receive(mailbox, |wire| R::from_wire(wire, &memory));
        core.disarm();
        received.map_err(|invalid| {
            if let InvalidResult::Inaccessible { .. } = invalid {
                self.core.memory_mut().distrust_pages();
            }
            self.discard();
            self.violation(ViolationKind::InvalidResult(invalid))
        })
    }

    #[cold]
    fn failed(&mut self, failure: Failure<Trapped, Error>, closure: &'static str) -> Violation {
        if let Failure::NotReady(error) = failure {
            return self.violation(ViolationKind::NotReady(error));
        }
        let memory = self.core.memory();
        memory.ensure_rights_after_call();
        if let Some(owner) = memory.thread_pointer_with_statics() {
            globals::unlock_streams(owner);
        }
        let (loaded, trap) = (memory.loaded_count(), memory.trap());
        let is_told = is_told_by_its_state(trap) && !memory.is_own(trap.at.address);
        let at = is_told.then_some(trap.at);
        let last = self.last.as_ref().filter(|last| last.loaded == loaded);
        if let Some(same) = last.filter(|last| is_told && last.at == at && last.violation.is_of(closure)) {
            return same.violation.clone();
        }
        let (kind, instruction) = classify(memory, trap);
        if kind.address().is_some_and(|address| memory.is_own(address)) {
            self.core.memory_mut().distrust_pages();
        }
        let memory = self.core.memory();
        let last = self.last.as_ref().filter(|last| last.loaded == loaded).map(|last| &last.violation);
        if let Some(same) = last.filter(|last| last.is(&kind, instruction, closure)) {
            return same.clone();
        }
        let violation = Violation::of_trap(self.name.clone(), memory, kind, instruction, closure, last);
        // Where a name is missing for now, the next one looks again.
        self.last = violation.is_complete().then(|| Last { loaded, at, violation: violation.clone() });
        violation
    }

    #[cold]
    fn not_ready(&self, error: Error) -> Violation {
        // With its own copy of the name: code in another domain gets here too, and cannot write this one's count.
        Violation::new(Arc::from(&*self.name), ViolationKind::NotReady(error))
    }

    #[cold]
    fn violation(&self, kind: ViolationKind) -> Violation {
        Violation::new(self.name.clone(), kind)
    }

    /// Counts a violation, logs it, and calls the hook.
    #[cold]
    fn report(&mut self, violation: Violation) -> Violation {
        if self.core.memory().is_learning() {
            return violation;
        }
        if self.limits.retire_after.is_some()
            && !matches!(violation.kind(), ViolationKind::NotReady(_) | ViolationKind::Retired)
        {
            self.violations = self.violations.saturating_add(1);
        }
        #[cfg(feature = "log")]
        log::warn!(target: "pkru", "{violation}");
        if let Some(hook) = &self.hook {
            hook(&violation);
        }
        violation
    }
}

impl From<DeadlineError> for ViolationKind {
    fn from(error: DeadlineError) -> Self {
        match error {
            DeadlineError::Passed => Self::Deadline,
            DeadlineError::Timer(error) => Self::NotReady(error),
        }
    }
}

/// Has a domain discarded before the next call, unless it is disarmed.
struct DiscardedLater<'a>(&'a mut Core<PkuBackend>);

impl DiscardedLater<'_> {
    #[inline]
    fn disarm(self) {
        std::mem::forget(self);
    }
}

impl Drop for DiscardedLater<'_> {
    fn drop(&mut self) {
        self.0.discard_later();
    }
}
