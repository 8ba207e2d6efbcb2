//! Domains of an ordinary program.

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;

use pkru::ProtectionKey;
use pkru::domain::{Domain as Core, Failure, Sizes};

pub(crate) use pkru::domain::default_rights;

use crate::platform::{Linux, MAILBOX};
use crate::process::Process;
use crate::signal::Trap;
use crate::transfer::{DomainMemory, Transfer};
use crate::violation::{Violation, ViolationKind};
use crate::{Error, sys, thread, tls};

/// A compartment of this process in which C and unsafe Rust can run without endangering the rest.
///
/// Code in a domain has a stack, a heap and thread-locals of its own. It can read everything that the program can, except
/// other domains, and write nothing but its own memory. What it does wrong ends its call with a [`Violation`]; the next call
/// finds the domain empty, and works.
///
/// State that code leaves in the domain, on its heap, lasts from call to call until a violation.
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
pub struct Domain {
    core: Core<Linux>,
    name: Arc<str>,
    /// Blocks of the domain's heap whose contents the last result was copied from. The domain frees them at the next call.
    to_free: Vec<usize>,
}

/// Chooses what a [`Domain`] is made of.
#[derive(Debug, Clone)]
pub struct Builder {
    name: Arc<str>,
    stack: usize,
    heap: usize,
}

impl Builder {
    /// The smallest stack, in bytes.
    const MINIMUM_STACK: usize = 4 * MAILBOX;
    /// The smallest heap, in bytes.
    const MINIMUM_HEAP: usize = 4 * 4096;

    /// Sets the size of the stack in bytes, rounded up to pages: 1 MiB if it is not set.
    #[must_use]
    pub const fn stack_size(mut self, bytes: usize) -> Self {
        self.stack = bytes;
        self
    }

    /// Sets the size of the heap in bytes, rounded up to pages: 64 MiB if it is not set. Memory is used as it is touched.
    #[must_use]
    pub const fn heap_size(mut self, bytes: usize) -> Self {
        self.heap = bytes;
        self
    }

    /// Makes the domain.
    ///
    /// The first time in a process this finds out what the machine can do, and installs handlers for the signals that faults
    /// raise. Each time it binds what libraries loaded since then call, and tries a first call.
    ///
    /// # Errors
    ///
    /// What is missing on this machine, a size that it cannot have, or that every protection key is in use.
    pub fn build(self) -> Result<Domain, Error> {
        if tls::is_in_domain() {
            return Err(Error::InDomain);
        }
        let limit = sys::physical_memory();
        for (part, requested, minimum) in
            [("stack", self.stack, Self::MINIMUM_STACK), ("heap", self.heap, Self::MINIMUM_HEAP)]
        {
            if requested < minimum || requested > limit {
                return Err(Error::Size { part, requested, minimum, limit });
            }
        }
        let process = Process::get()?;
        let sizes = Sizes { stack: self.stack + MAILBOX, heap: self.heap };
        let core = Core::new(Linux(process), sizes)?;
        let mut domain = Domain { core, name: self.name, to_free: Vec::new() };
        // The program may have a `#[global_allocator]` that is not the system's.
        let heap = domain.core.memory().heap();
        match domain.call(|| std::ptr::from_ref(&*Box::new(0u64)) as usize) {
            Ok(block) if heap.contains(&block) => Ok(domain),
            _ => Err(Error::MallocNotRouted),
        }
    }
}

/// What the code in the domain is handed: all of it in the caller's memory, which it can read.
struct Call<'a, F> {
    function: &'a F,
    /// In the domain's memory.
    mailbox: usize,
    to_free: &'a [usize],
}

impl Domain {
    /// Starts to make a domain; the name appears in violations.
    #[must_use]
    pub fn builder(name: &str) -> Builder {
        Builder { name: name.into(), stack: 1 << 20, heap: 64 << 20 }
    }

    /// Runs a function in the domain.
    ///
    /// The function reads what it has captured in place, in the caller's memory. It is [`Fn`], because it cannot write there:
    /// a `Cell`, a lock or an atomic of the caller's ends in a violation, and so does what writes statics of the C library
    /// or of std (`println!`, `std::env`). Its result is [`Transfer`]red: the caller copies and checks it. What the result is made of
    /// besides vectors and strings can have at most 4096 bytes.
    ///
    /// A mistake shows when memory outside is touched, not when it is made: what code does to its own domain's heap may end a
    /// later call.
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
    /// How the code misbehaved. Nothing outside the domain was written, and it can be called again; the next call finds it empty.
    /// Destructors of what lived in the domain do not run. A Rust panic, and an allocation that fails in Rust, are seen as the
    /// first write to a static that std makes about them. Code in a domain cannot call a domain.
    pub fn call<F: Fn() -> R, R: Transfer>(&mut self, function: F) -> Result<R, Violation> {
        const { assert!(size_of::<R::Wire>() <= MAILBOX, "a result this large goes in a Vec") };
        const { assert!(align_of::<R::Wire>() <= MAILBOX) };
        let signal_stack = match thread::make_ready(self.core.key()) {
            Ok(stack) => stack,
            // With a name of its own: code in another domain, which gets here too, cannot count references to this one.
            Err(error) => return Err(Violation::new(Arc::from(&*self.name), ViolationKind::NotReady(error))),
        };
        let memory = self.core.memory_mut();
        memory.set_signal_stack(signal_stack);
        let mailbox = memory.mailbox().start;
        let call = Call { function: &function, mailbox, to_free: &self.to_free };
        // SAFETY: the thread is ready. What `run` does in the domain is what the domain is there to contain; its result is not
        // trusted. The call's data and what it refers to outlive it, and the domain cannot write them.
        let result = unsafe { self.core.enter(run::<F, R>, &raw const call as u64) };
        if !self.to_free.is_empty() {
            self.to_free.clear();
        }
        match result {
            Ok(_) => self.receive(mailbox),
            Err(failure) => Err(self.failed(failure)),
        }
    }

    /// Drops everything that the domain holds, and gives its memory back to the system.
    ///
    /// After a violation the next call does so in any case; this does it at once.
    pub fn discard(&mut self) {
        self.to_free.clear();
        self.core.discard();
    }

    /// Returns the domain's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the domain's protection key.
    #[must_use]
    pub const fn key(&self) -> ProtectionKey {
        self.core.key()
    }

    #[inline]
    fn receive<R: Transfer>(&mut self, mailbox: usize) -> Result<R, Violation> {
        let mut wire = MaybeUninit::<R::Wire>::uninit();
        // SAFETY: the mailbox is in the domain's memory, which this thread can read; nothing runs in the domain. The copy is the
        // only one: what is checked is what is used.
        unsafe { std::ptr::copy_nonoverlapping(mailbox as *const R::Wire, wire.as_mut_ptr(), 1) };
        // SAFETY: any bytes are a value of a plain type.
        let wire = unsafe { wire.assume_init() };
        let ranges = self.core.memory().readable();
        let heap = self.core.memory().heap();
        // SAFETY: these are the domain's mapped memory, which this thread can read; nothing runs in the domain.
        let memory = unsafe { DomainMemory::new(&ranges, heap) };
        let received = R::receive(wire, &memory);
        match received {
            Ok(value) => {
                let received = memory.into_received();
                if !received.is_empty() {
                    self.to_free = received;
                }
                Ok(value)
            }
            Err(invalid) => {
                self.discard();
                Err(self.violation(ViolationKind::InvalidResult(invalid)))
            }
        }
    }

    #[cold]
    fn failed(&self, failure: Failure<Trap, Error>) -> Violation {
        match failure {
            Failure::Trap(trap) => Violation::of_trap(&self.name, self.core.memory(), &trap),
            Failure::NotReady(error) => self.violation(ViolationKind::NotReady(error)),
        }
    }

    #[cold]
    fn violation(&self, kind: ViolationKind) -> Violation {
        Violation::new(self.name.clone(), kind)
    }
}

/// Runs in the domain.
unsafe extern "C" fn run<F: Fn() -> R, R: Transfer>(call: u64) -> u64 {
    // SAFETY: `Domain::call` passes the address of its own.
    let call = unsafe { &*(call as *const Call<'_, F>) };
    for block in call.to_free {
        // SAFETY: the block was lent to the caller by the call before. Whether it really was is for the domain's heap to check.
        unsafe { libc::free(*block as *mut libc::c_void) };
    }
    let wire = (call.function)().lend();
    // SAFETY: the mailbox is in the domain's memory, page-aligned and large enough, and above the stack in use.
    unsafe { (call.mailbox as *mut R::Wire).write(wire) };
    0
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = self.core.memory();
        f.debug_struct("Domain")
            .field("name", &self.name)
            .field("key", &self.core.key())
            .field("stack", &format_args!("{:#x?}", memory.stack()))
            .field("heap", &format_args!("{:#x?}", memory.heap()))
            .finish_non_exhaustive()
    }
}
