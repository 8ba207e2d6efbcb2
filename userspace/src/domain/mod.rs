//! Domains of an ordinary program.

mod builder;

use std::any::type_name;
use std::cell::Cell;
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pkru::ProtectionKey;
use pkru::domain::{Domain as Core, Entry, Failure};

pub use builder::Builder;
pub(crate) use pkru::domain::default_rights;

use crate::callback::{self, Callback, CallbackArguments, Callbacks, Head, Suspended};
use crate::platform::{Linux, MAILBOX};
use crate::region::Region;
use crate::signal::{self, Trap};
use crate::thread::{self, Thread};
use crate::transfer::{self, DomainMemory, Transfer};
use crate::violation::{Violation, ViolationKind};
use crate::{Error, sys};

/// A compartment of this process in which C and unsafe Rust can run without endangering the rest.
///
/// Code in a domain has a stack, a heap and thread-locals of its own. It can read everything that the program can,
/// except other domains and [vaults](crate::Vault), and write nothing but its own memory. What it does wrong ends its
/// call with a [`Violation`]; the next call finds the domain empty, and works.
///
/// State that code leaves on the domain's heap lasts from call to call until a violation. Its thread-locals do too,
/// while one thread makes the calls; a call from another finds new ones.
///
/// # Examples
///
/// ```
/// use pkru_userspace::{Domain, Error};
///
/// # fn main() -> Result<(), Error> {
/// # if pkru_userspace::capability::detect().is_err() { return Ok(()) }
/// let mut domain = Domain::builder("parser").build()?;
/// let text = String::from("seven");
///
/// // The closure reads `text` in place; its result is checked and copied out.
/// let length = domain.call(|| text.len()).expect("nothing goes wrong here");
/// assert_eq!(length, 5);
///
/// // A write to the caller's memory is stopped, and the program goes on.
/// let address = text.as_ptr().cast_mut();
/// let violation = domain.call(|| unsafe { address.write(b'S') }).unwrap_err();
/// assert_eq!(violation.address(), Some(address as u64));
/// assert_eq!(text, "seven");
/// # Ok(())
/// # }
/// ```
///
/// State that lasts: the caller holds its address, as a number, and forgets it when a call was a violation.
///
/// ```
/// use pkru_userspace::{Domain, Violation};
///
/// /// A counter in a domain, by its address.
/// struct Counter {
///     domain: Domain,
///     address: Option<usize>,
/// }
///
/// impl Counter {
///     fn count(&mut self) -> Result<u64, Violation> {
///         let known = self.address;
///         let result = self.domain.call(|| {
///             let counter = known.map_or_else(|| Box::into_raw(Box::new(0)), |address| address as *mut u64);
///             // SAFETY: it is the last call's, or new; the domain has not been emptied since.
///             unsafe { *counter += 1 };
///             // SAFETY: as above.
///             (counter as usize, unsafe { *counter })
///         });
///         self.address = result.as_ref().ok().map(|(address, _)| *address);
///         result.map(|(_, count)| count)
///     }
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # if pkru_userspace::capability::detect().is_err() { return Ok(()) }
/// let mut counter = Counter { domain: Domain::builder("counter").build()?, address: None };
/// assert_eq!((counter.count()?, counter.count()?), (1, 2));
/// # Ok(())
/// # }
/// ```
pub struct Domain {
    core: Core<Linux>,
    name: Arc<str>,
    limits: Limits,
    /// Whether any of them is set.
    has_limits: bool,
    hook: Option<Hook>,
    /// Violations since the last good call; counted if the domain can be retired.
    violations: u32,
    /// Regions that the domain can use, which must live as long.
    _regions: Vec<Region>,
}

type Hook = Arc<dyn Fn(&Violation) + Send + Sync>;

/// What a domain does beyond the usual.
#[derive(Debug, Clone, Copy, Default)]
struct Limits {
    transient: bool,
    deadline: Option<Duration>,
    retire_after: Option<u32>,
}

impl Limits {
    const fn are_set(self) -> bool {
        self.transient || self.deadline.is_some() || self.retire_after.is_some()
    }
}

/// What the code in the domain is handed: all of it in the caller's memory, which it can read.
#[repr(C)]
struct Call<'a, F> {
    function: &'a F,
    /// In the domain's memory.
    mailbox: usize,
}

impl Domain {
    /// Starts to make a domain; the name appears in violations.
    pub fn builder(name: &str) -> Builder {
        Builder::new(name)
    }

    fn new(core: Core<Linux>, name: Arc<str>, regions: Vec<Region>) -> Self {
        Self { core, name, limits: Limits::default(), has_limits: false, hook: None, violations: 0, _regions: regions }
    }

    fn set_limits(&mut self, limits: Limits, hook: Option<Hook>) {
        self.limits = limits;
        self.has_limits = limits.are_set();
        self.violations = 0;
        self.hook = hook;
    }

    /// Runs a function in the domain.
    ///
    /// The function reads what it has captured in place, in the caller's memory. It is [`Fn`], because it cannot write
    /// there: a `Cell`, a lock or an atomic of the caller's ends in a violation, and so does what writes statics of the
    /// C library or of std (`println!`, `std::env`). Its result is [`Transfer`]red: the caller copies and checks it.
    /// What the result is made of besides vectors and strings can have at most 4096 bytes.
    ///
    /// A panic ends the call, also within `catch_unwind`. Code in a domain starts no threads (a violation) and no
    /// processes (`fork`, `posix_spawn`, `system` and `popen` fail with `EPERM`), sets no signal handlers and sends
    /// other threads no signals (`EPERM`). Functions that write the C library's own state, or std's, end in a
    /// violation: `localtime_r`, `setlocale`, `dlopen`, `pthread_once`, `std::thread::current`; see [`Builder`] for the
    /// ways out.
    ///
    /// Thread-locals in the domain are its own: what the closure captures must not rely on the caller's, as a handle that
    /// indexes one does.
    ///
    /// A mistake shows when memory outside is touched, not when it is made: what code does to its own domain's heap may
    /// end a later call.
    ///
    /// If calls of other threads have all protection keys at that moment, this waits for one of them to end; in the
    /// middle of another call, as in a signal handler, only for half a second or so. A signal handler may call a domain
    /// as far as it may allocate memory: what it interrupts must not be in the middle of that.
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
    /// How the code misbehaved. Nothing outside the domain was written, and it can be called again; the next call finds
    /// it empty. Destructors of what lived in the domain do not run. Code in a domain cannot call a domain, but it can
    /// ask its caller to, by a [callback](Self::call_with).
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
        let pin = match self.core.memory_mut().pin(thread) {
            Ok(pin) => pin,
            Err(error) => return Err(self.not_ready(error)),
        };
        let mailbox = self.core.memory().mailbox().start;
        let call = Call { function: &function, mailbox };
        // SAFETY: the thread is ready. What `run` does in the domain is what the domain is there to contain; its result
        // is not trusted. The call's data and what it refers to outlive it, and the domain cannot write them.
        let result = unsafe { self.core.enter(run::<F, R>, &raw const call as u64) };
        let received = match result {
            Ok(_) => self.receive(mailbox),
            Err(failure) => Err(self.failed(failure, type_name::<F>())),
        };
        drop(pin);
        received.map_err(|violation| self.report(violation))
    }

    /// Runs a function in the domain that can call back: each closure in `callbacks` becomes a C function, which code
    /// in the domain can call by the pointer that the function is given for it.
    ///
    /// A callback runs as ordinary code of the caller, with the caller's rights, on the caller's stack: it may change
    /// what it has captured, and call other domains. What it is called with, and when, is up to the code in the domain,
    /// and not to be trusted: see [`CallbackArguments`]. The pointers mean nothing after this call: code that keeps one
    /// and uses it in a later call has a violation, unless that call has as many callbacks.
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
    /// With a callback's own panic; the domain is empty afterwards. If there are more than 64 callbacks.
    pub fn call_with<F: Fn(&[Callback]) -> R, R: Transfer>(
        &mut self,
        callbacks: Callbacks<'_, '_>,
        function: F,
    ) -> Result<R, Violation> {
        self.call_with_name(callbacks, function, type_name::<F>())
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
        let thread = match thread::make_ready() {
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
        let mut pin = self.core.memory_mut().pin(thread).map_err(|error| not_ready(error, self))?;
        let deadline = Deadline::start(self.limits.deadline, thread).map_err(|kind| self.violation(kind))?;
        let mailbox = self.core.memory().mailbox().start;
        let pointers = callback::pointers(callbacks.len());
        let function = || function(&pointers);
        let call = Call { function: &function, mailbox };
        let head = Head::new(&raw const call as u64, callbacks.len(), self.core.memory());
        // SAFETY: as in `call`.
        let mut result = unsafe { self.core.enter(entry_for(&function), &raw const head as u64) };
        loop {
            deadline.pause();
            let request = match result {
                Ok(0) => return self.receive(mailbox),
                Ok(request) => request,
                Err(failure) => return Err(self.failed(failure, name)),
            };
            self.core.memory().open_after_call();
            let Some(suspended) = Suspended::read(request, self.core.memory(), callbacks.len()) else {
                self.core.discard();
                return Err(self.violation(ViolationKind::Callback));
            };
            // The closure may call so many domains that this one's key is needed.
            drop(pin);
            self.core.suspended();
            let value = {
                let mut arguments = CallbackArguments::new(&suspended, self.core.memory_mut(), thread);
                callbacks[suspended.index](&mut arguments)
            };
            pin = self.core.memory_mut().pin_again(thread).map_err(|error| not_ready(error, self))?;
            if let Err(kind) = deadline.go_on() {
                self.core.discard();
                return Err(self.violation(kind));
            }
            let reply = suspended.reply(value);
            // SAFETY: as in `call`; the entry point takes the domain's stack up where it was left.
            result = unsafe { self.core.resume(callback::RESUME, &raw const reply as u64) };
        }
    }

    #[cold]
    fn call_from_new_thread<F: Fn() -> R, R: Transfer>(&mut self, function: F) -> Result<R, Violation> {
        match thread::make_ready() {
            Ok(_) => self.call(function),
            Err(error) => Err(self.not_ready(error)),
        }
    }

    /// Drops everything that the domain holds, and gives its memory back to the system.
    ///
    /// After a violation the next call does so in any case; this does it at once.
    pub fn discard(&mut self) {
        self.core.discard();
    }

    /// Returns whether the domain is [retired](Builder::retire_after).
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.limits.retire_after.is_some_and(|limit| self.violations >= limit)
    }

    /// Lets a domain be called again that was [retired](Builder::retire_after).
    pub const fn reinstate(&mut self) {
        self.violations = 0;
    }

    /// Returns the domain's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the protection key that the domain has at the moment: `None` while others have them all.
    #[must_use]
    pub fn key(&self) -> Option<ProtectionKey> {
        self.core.memory().key()
    }

    /// Returns how many violations there were since the last good call; counted only with [`Builder::retire_after`].
    #[must_use]
    pub const fn violations(&self) -> u32 {
        self.violations
    }

    #[inline]
    fn receive<R: Transfer>(&mut self, mailbox: usize) -> Result<R, Violation> {
        // What this runs can panic, and a transient domain is to be empty all the same.
        let core = DiscardedLater(&mut self.core);
        core.0.memory().open_after_call();
        let mut wire = MaybeUninit::<R::Wire>::uninit();
        // SAFETY: the mailbox is in the domain's memory, which this thread can read; nothing runs in the domain. The
        // copy is the only one: what is checked is what is used.
        unsafe { std::ptr::copy_nonoverlapping(mailbox as *const R::Wire, wire.as_mut_ptr(), 1) };
        // SAFETY: any bytes are a value of a plain type.
        let wire = unsafe { wire.assume_init() };
        let ranges = core.0.memory().readable();
        // SAFETY: these are the domain's mapped memory, which this thread can read; nothing runs in the domain.
        let memory = unsafe { DomainMemory::new(&ranges) };
        let received = R::receive(wire, &memory);
        core.disarm();
        received.map_err(|invalid| {
            self.discard();
            self.violation(ViolationKind::InvalidResult(invalid))
        })
    }

    #[cold]
    fn failed(&mut self, failure: Failure<Trap, Error>, closure: &'static str) -> Violation {
        match failure {
            Failure::Trap(trap) => {
                self.core.memory().open_after_call();
                Violation::of_trap(&self.name, self.core.memory(), &trap, closure)
            }
            Failure::NotReady(error) => self.violation(ViolationKind::NotReady(error)),
        }
    }

    #[cold]
    fn not_ready(&self, error: Error) -> Violation {
        // With a name of its own: code in another domain, which gets here too, cannot count references to this one.
        Violation::new(Arc::from(&*self.name), ViolationKind::NotReady(error))
    }

    #[cold]
    fn violation(&self, kind: ViolationKind) -> Violation {
        Violation::new(self.name.clone(), kind)
    }

    /// Makes a violation known.
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

/// Has a domain discarded before the next call, unless it is disarmed.
struct DiscardedLater<'a>(&'a mut Core<Linux>);

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

/// Runs in the domain.
unsafe extern "C" fn run<F: Fn() -> R, R: Transfer>(call: u64) -> u64 {
    // SAFETY: `Domain::call` passes the address of its own.
    let call = unsafe { &*(call as *const Call<'_, F>) };
    transfer::free_lent();
    let wire = (call.function)().lend();
    // SAFETY: the mailbox is in the domain's memory, page-aligned and large enough, and above the stack in use.
    unsafe { (call.mailbox as *mut R::Wire).write(wire) };
    0
}

/// Whether a function has this name which runs in the domain, and into which closures may be inlined.
pub(crate) fn is_entry(name: &str) -> bool {
    name.strip_prefix(concat!(module_path!(), "::run")).is_some_and(|rest| rest.is_empty() || rest == "_with_callbacks")
}

/// The same for a call that has callbacks.
unsafe extern "C" fn run_with_callbacks<F: Fn() -> R, R: Transfer>(head: u64) -> u64 {
    // SAFETY: `Domain::call_with` passes the address of its own.
    let head = unsafe { &*(head as *const Head) };
    callback::begin(head);
    // SAFETY: as above.
    let result = unsafe { run::<F, R>(head.call()) };
    callback::end();
    result
}

/// Names the entry point for a closure whose type has no name.
fn entry_for<F: Fn() -> R, R: Transfer>(_: &F) -> Entry {
    run_with_callbacks::<F, R>
}

/// The time that a call may take.
struct Deadline<'a> {
    end: Option<Instant>,
    /// The thread whose timer it is.
    thread: &'a Thread,
    /// The timer is running.
    is_armed: Cell<bool>,
}

impl<'a> Deadline<'a> {
    fn start(limit: Option<Duration>, thread: &'a Thread) -> Result<Self, ViolationKind> {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        let deadline = Self { end, thread, is_armed: Cell::new(false) };
        // It can have passed already.
        deadline.go_on()?;
        Ok(deadline)
    }

    /// Starts the timer for the time that is left.
    fn go_on(&self) -> Result<(), ViolationKind> {
        let Some(end) = self.end else { return Ok(()) };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ViolationKind::Deadline);
        }
        // The child of a fork, which a callback can have made, has no timer of its parent's.
        let timer = match self.thread.timer().get() {
            Some(timer) => timer,
            None => sys::create_timer(signal::DEADLINE, signal::deadline_value())
                .map_err(Error::system("make a timer for deadlines"))
                .map_err(ViolationKind::NotReady)?,
        };
        self.thread.timer().set(Some(timer));
        self.is_armed.set(true);
        sys::set_timer(timer, Some(left))
            .map_err(Error::system("start the timer for a deadline"))
            .map_err(ViolationKind::NotReady)
    }

    /// Stops the timer.
    fn pause(&self) {
        if self.is_armed.take()
            && let Some(timer) = self.thread.timer().get()
        {
            // It cannot fail for a timer that exists.
            let _ = sys::set_timer(timer, None);
        }
    }
}

impl Drop for Deadline<'_> {
    fn drop(&mut self) {
        self.pause();
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = self.core.memory();
        f.debug_struct("Domain")
            .field("name", &self.name)
            .field("key", &memory.key())
            .field("stack", &format_args!("{:#x?}", memory.stack()))
            .field("heap", &format_args!("{:#x?}", memory.heap()))
            .finish_non_exhaustive()
    }
}
