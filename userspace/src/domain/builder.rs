//! Making domains.

#![expect(unsafe_code, reason = "two options have safety contracts")]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pkru::AccessRights;
use pkru::domain::{Domain as Core, Sizes, default_rights};
use pkru::heap::{DomainHeap, HeapChecks};
use pkru::{KeyRights, ProtectionKey};

use super::limits::Limits;
use super::{Domain, Hook};
use crate::backend::pku::{MAILBOX, PkuBackend};
use crate::fork_lock::ForkLock;
use crate::keys::statics::Globals;
use crate::loader::library_data::LibraryData;
use crate::memory::tls;
use crate::setup::{self, globals, process};
use crate::shared::region::{Region, RegionAccess};
use crate::signal::panics;
use crate::thread::signal_stack_key;
use crate::trusted::trusted;
use crate::violation::{Violation, ViolationKind};
use crate::{Error, rights, sys};

trusted! {
    /// Whether a trial has shown what std does about a panic.
    static HAS_LEARNED: AtomicBool = AtomicBool::new(false);
    static LEARNING: ForkLock = ForkLock::new();
}

/// Builds a [`Domain`].
///
/// A clone builds another domain of the same kind. With a [`library`](Self::library) only one domain at a time can be
/// built, because only one can own its data.
#[derive(Clone)]
#[must_use]
pub struct Builder {
    name: Arc<str>,
    stack: usize,
    heap: usize,
    mapped: usize,
    thread_locals: usize,
    on_demand: Vec<Range<usize>>,
    heap_checks: HeapChecks,
    limits: Limits,
    hook: Option<Hook>,
    libraries: Vec<String>,
    globals: Globals,
    regions: Vec<(Region, AccessRights)>,
}

impl Builder {
    /// The smallest stack, in bytes.
    const MINIMUM_STACK: usize = 4 * MAILBOX;
    /// The smallest heap, in bytes.
    const MINIMUM_HEAP: usize = 4 * 4096;

    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            stack: 1 << 20,
            heap: 64 << 20,
            mapped: 64 << 20,
            thread_locals: tls::SIZE,
            on_demand: Vec::new(),
            heap_checks: HeapChecks::default(),
            limits: Limits::default(),
            hook: None,
            libraries: Vec::new(),
            globals: Globals::Protected,
            regions: Vec::new(),
        }
    }

    /// Sets the size of the stack in bytes, rounded up to pages. The default is 1 MiB.
    pub const fn stack_size(mut self, bytes: usize) -> Self {
        self.stack = bytes;
        self
    }

    /// Sets the size of the heap in bytes, rounded up to pages. The default is 64 MiB, the limit 16 GiB. Memory is
    /// allocated when it is first touched.
    ///
    /// Give it twice the size of what it is to hold. Like other allocators, it cannot always use the space between blocks.
    pub const fn heap_size(mut self, bytes: usize) -> Self {
        self.heap = bytes;
        self
    }

    /// Names addresses that the program's own handlers of SIGSEGV and SIGBUS fill on demand. May be called more than once.
    ///
    /// A handler of SIGSEGV is asked anyway about a mapped page without access that is not the domain's, if the program has
    /// installed it over another one, such as std's. For these addresses it is always asked, and
    /// the handler of SIGBUS too. If the access faults again afterwards, that is a violation. No handler is asked about an
    /// access that a protection key denies, or about an unmapped address.
    pub fn filled_on_demand(mut self, addresses: Range<usize>) -> Self {
        self.on_demand.push(addresses);
        self
    }

    /// Sets the size in bytes, rounded up to pages, of the memory for thread-locals: those of the executable, of every loaded
    /// library, and of those that are loaded later. The default is 256 KiB. If they do not fit, [`build`](Self::build) fails
    /// with [`Error::ThreadLocals`].
    pub const fn thread_locals_size(mut self, bytes: usize) -> Self {
        self.thread_locals = bytes;
        self
    }

    /// Sets the size in bytes, rounded up to pages, of the addresses that are reserved for what code in the domain maps with
    /// mmap(2). The default is 64 MiB. Beyond that, and with a size of 0, mmap fails with `ENOMEM`.
    ///
    /// Mappings that are not fixed lie there. They are the domain's, count for nothing until they are made, and are gone
    /// after a discard. A file can be mapped too.
    pub const fn mapped_size(mut self, bytes: usize) -> Self {
        self.mapped = bytes;
        self
    }

    /// Sets how thoroughly the domain's heap looks for mistakes of the code that uses it. The default is
    /// [`HeapChecks::Fast`].
    pub const fn heap_checks(mut self, checks: HeapChecks) -> Self {
        self.heap_checks = checks;
        self
    }

    /// Makes the domain transient: each call finds it empty. By default state lasts from call to call until a violation.
    pub const fn transient(mut self) -> Self {
        self.limits.transient = true;
        self
    }

    /// Ends a call that takes longer than this with [`ViolationKind::Deadline`]. Zero ends every call.
    ///
    /// The time is wall-clock time. It includes callbacks, and excludes the wait for a protection key. A deadline costs
    /// two system calls for each call. Code that waits in a system call which blocks SIGFPE (`ppoll` with a mask) ends
    /// only when it wakes.
    pub const fn deadline(mut self, time: Duration) -> Self {
        self.limits.deadline = Some(time);
        self
    }

    /// Retires the domain after this many violations in a row. Further calls then run nothing and fail with
    /// [`ViolationKind::Retired`], until [`Domain::reinstate`].
    ///
    /// # Panics
    ///
    /// If `violations` is 0.
    pub const fn retire_after(mut self, violations: u32) -> Self {
        assert!(violations > 0, "a domain is retired after one violation at least");
        self.limits.retire_after = Some(violations);
        self
    }

    /// Sets a function that is called with each violation before the caller gets it, except [`ViolationKind::Retired`].
    pub fn on_violation(mut self, hook: impl Fn(&Violation) + Send + Sync + 'static) -> Self {
        self.hook = Some(Arc::new(hook));
        self
    }

    /// Runs `function` once, now, outside the domain, to initialise statics. Its result is dropped.
    ///
    /// Code that fills tables in statics at its first use cannot do so in a domain.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # unsafe extern "C" { fn codec_init() -> i32; }
    /// use pkru_userspace::Domain;
    ///
    /// // SAFETY: it has no preconditions.
    /// let domain = Domain::builder("codec").warm_up(|| assert_eq!(unsafe { codec_init() }, 0)).build()?;
    /// # Ok::<(), pkru_userspace::Error>(())
    /// ```
    pub fn warm_up<R>(self, function: impl FnOnce() -> R) -> Self {
        function();
        self
    }

    /// Gives the domain the writable data of a loaded shared library. `name` is its file name: `libfoo.so`, or with a
    /// version `libfoo.so.1`.
    ///
    /// Code in the domain can then write the library's statics. A discard restores them to what they were when the domain
    /// was built, and so does dropping the domain. No other domain can use the library until then.
    ///
    /// # Safety
    ///
    /// Until the domain is dropped, the program does not use the library outside the domain, also not through other
    /// libraries: it would find what code in the domain left in the library's data, function pointers included. When the
    /// program exits the data is restored before destructors run.
    pub unsafe fn library(mut self, name: &str) -> Self {
        self.libraries.push(name.into());
        self
    }

    /// Sets what the domain may do with the statics of the program and its libraries. By default it can only read them.
    ///
    /// # Safety
    ///
    /// [`Globals::Protected`] is always safe. With [`Globals::Writable`] the caller promises that, after each call and
    /// after a violation:
    ///
    /// - statics that code in the domain has written hold values of their types, also where safe code wrote them;
    /// - the program does not free what they point to on the domain's heap, and does not use it once the domain is
    ///   discarded or dropped.
    pub const unsafe fn globals(mut self, globals: Globals) -> Self {
        self.globals = globals;
        self
    }

    /// Gives the domain access to a region of shared memory.
    pub fn region(mut self, region: &Region, access: RegionAccess) -> Self {
        self.regions.push((region.clone(), access.rights()));
        self
    }

    /// Makes the domain.
    ///
    /// The first domain of a process checks what the machine offers and takes over signal handling. Each domain binds the
    /// functions of libraries that were loaded since the last one, and makes a trial call.
    ///
    /// # Errors
    ///
    /// What the machine lacks, a size out of range, [`Error::KeysExhausted`], or [`Error::TrialCall`]. Programs built with
    /// `-C instrument-coverage` fail with the last one, because their counters are statics: give the domain
    /// [`Globals::Writable`].
    pub fn build(self) -> Result<Domain, Error> {
        let (globals, limits, hook) = (self.globals, self.limits, self.hook.clone());
        let mut domain = self.assemble()?;
        if !HAS_LEARNED.load(Ordering::Acquire) {
            let _guard = LEARNING.lock();
            if !HAS_LEARNED.load(Ordering::Acquire) {
                let has_run = match globals {
                    Globals::Protected => domain.try_a_panic(),
                    // The trial needs a domain that cannot write statics.
                    Globals::Writable => Self::new("trial").assemble().is_ok_and(|mut domain| domain.try_a_panic()),
                };
                // Until a trial has run, panics have no message.
                HAS_LEARNED.store(has_run && process::has_panic_hook(), Ordering::Release);
            }
        }
        domain.set_limits(limits, hook);
        Ok(domain)
    }

    fn assemble(self) -> Result<Domain, Error> {
        if rights::is_in_domain() {
            return Err(Error::InDomain);
        }
        let most = sys::physical_memory();
        for (part, requested, minimum, limit) in [
            ("stack", self.stack, Self::MINIMUM_STACK, most),
            ("heap", self.heap, Self::MINIMUM_HEAP, most.min(DomainHeap::LARGEST)),
            ("mapped memory", self.mapped, 0, most),
            ("memory for thread-locals", self.thread_locals, 4096, most),
        ] {
            if requested < minimum || requested > limit {
                return Err(Error::Size { part, requested, minimum, limit });
            }
        }
        process::make_ready()?;
        let rights = self.rights();
        if self.globals == Globals::Writable {
            globals::open_statics(setup::thread::make_ready()?)?;
        }
        let libraries =
            self.libraries.iter().map(|name| LibraryData::take(name).map(Arc::new)).collect::<Result<_, _>>()?;
        let sizes = Sizes { stack: self.stack + MAILBOX, heap: self.heap };
        let backend = PkuBackend {
            rights,
            libraries,
            globals: self.globals,
            mapped: self.mapped,
            thread_locals: self.thread_locals,
            on_demand: self.on_demand.clone().into(),
            heap_checks: self.heap_checks,
        };
        let core = Core::new(backend, sizes)?;
        let regions = self.regions.iter().cloned().map(|(region, _)| region).collect();
        let mut domain = Domain::new(core, self.name.clone(), regions);
        domain.try_an_allocation()?;
        Ok(domain)
    }

    /// Returns the domain's rights to all keys but its own and the statics'.
    fn rights(&self) -> KeyRights {
        let nobody = default_rights(ProtectionKey::DEFAULT).with(ProtectionKey::DEFAULT, AccessRights::READ_ONLY);
        let with_stack = signal_stack_key().map_or(nobody, |key| nobody.with(key, AccessRights::READ_WRITE));
        self.regions.iter().fold(with_stack, |rights, (region, access)| rights.with(region.key(), *access))
    }
}

impl Domain {
    /// Starts to make a domain. The name appears in violations.
    pub fn builder(name: &str) -> Builder {
        Builder::new(name)
    }

    /// Makes a trial call that allocates. The program may have a `#[global_allocator]` that does not use the domain's
    /// heap.
    fn try_an_allocation(&mut self) -> Result<(), Error> {
        let heap = self.core.memory().heap();
        match self.call(|| std::ptr::from_ref(&*Box::new(0u64)) as usize) {
            Ok(block) if heap.contains(&block) => Ok(()),
            Ok(_) => Err(Error::MallocNotRouted),
            Err(violation) => Err(match violation.kind() {
                ViolationKind::NotReady(error) => error.clone(),
                _ => Error::TrialCall { violation: violation.to_string() },
            }),
        }
    }

    /// Makes a trial call that panics, from which the fault handler learns which statics std writes then. Returns whether
    /// it has run.
    fn try_a_panic(&mut self) -> bool {
        self.core.memory().set_learning(true);
        let result = self.call(|| -> () { panic!("to see how that goes") });
        self.core.memory().set_learning(false);
        let kind = result.as_ref().err().map(Violation::kind);
        let with_message =
            matches!(kind, Some(ViolationKind::Panic { message: Some(message) }) if message.contains("how that goes"));
        if !with_message {
            panics::forget();
        }
        !matches!(kind, Some(ViolationKind::NotReady(_)))
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("name", &self.name)
            .field("stack", &self.stack)
            .field("heap", &self.heap)
            .field("mapped", &self.mapped)
            .field("thread_locals", &self.thread_locals)
            .field("heap_checks", &self.heap_checks)
            .field("limits", &self.limits)
            .field("libraries", &self.libraries)
            .finish_non_exhaustive()
    }
}
