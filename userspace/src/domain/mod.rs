//! Domains: making them and calling into them.
//!
//! This is the public face. No module below uses it.
//!
//! | module | subject |
//! |---|---|
//! | [`builder`] | making a domain |
//! | [`call`] | calling into it |
//! | [`callback`] | calling back from it |
//! | [`deadline`], [`limits`] | what bounds a call |
//! | [`pool`] | domains that threads share |

mod builder;
mod call;
mod callback;
mod deadline;
mod limits;
mod pool;

use std::fmt;
use std::sync::Arc;

use pkru::ProtectionKey;
use pkru::domain::Domain as Core;

use crate::backend::pku::PkuBackend;
use crate::shared::region::Region;
use crate::signal::trap::Interrupted;
use crate::violation::Violation;
use limits::Limits;

pub use builder::Builder;
pub use callback::{Callback, CallbackArguments, Callbacks};
pub use pool::{Pool, Pooled};

/// A compartment of this process for C and unsafe Rust.
///
/// Code in a domain has its own stack, heap and thread-locals. It can read what the program can, except other domains and
/// [vaults](crate::Vault), and it can write only its own memory. If it misbehaves, its call ends with a [`Violation`], and
/// the next call finds the domain empty.
///
/// What code leaves on the domain's heap lasts until a violation. So do its thread-locals, until another thread calls the
/// domain and finds new ones.
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
/// State that lasts from call to call: the caller keeps its address as a number, and drops that after a violation.
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
    core: Core<PkuBackend>,
    name: Arc<str>,
    limits: Limits,
    /// Whether any of them is set.
    has_limits: bool,
    hook: Option<Hook>,
    /// Violations since the last call without one. Counted if the domain can be retired.
    violations: u32,
    /// The last violation that was a trap.
    last: Option<Last>,
    /// Regions that the domain can use. They live as long as the domain.
    _regions: Vec<Region>,
}

/// A function that is called with each violation.
type Hook = Arc<dyn Fn(&Violation) + Send + Sync>;

/// A violation that was a trap, to tell whether the next trap is the same.
struct Last {
    /// The [count of loaded objects](crate::sys::loaded_count) then.
    loaded: u64,
    /// The state that the trap interrupted, if it says all about the violation.
    at: Option<Interrupted>,
    violation: Violation,
}

impl Domain {
    fn new(core: Core<PkuBackend>, name: Arc<str>, regions: Vec<Region>) -> Self {
        Self {
            core,
            name,
            limits: Limits::default(),
            has_limits: false,
            hook: None,
            violations: 0,
            last: None,
            _regions: regions,
        }
    }

    fn set_limits(&mut self, limits: Limits, hook: Option<Hook>) {
        self.limits = limits;
        self.has_limits = limits.are_set();
        self.violations = 0;
        self.hook = hook;
    }

    /// Discards everything that the domain holds, and returns its memory to the system.
    ///
    /// After a violation the next call does so in any case. This does it at once.
    pub fn discard(&mut self) {
        self.core.discard();
    }

    /// Returns whether the domain is [retired](Builder::retire_after).
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.limits.retire_after.is_some_and(|limit| self.violations >= limit)
    }

    /// Ends the [retirement](Builder::retire_after) of the domain.
    pub const fn reinstate(&mut self) {
        self.violations = 0;
    }

    /// Returns the domain's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the protection key that the domain has at the moment; `None` if others have taken it.
    #[must_use]
    pub fn key(&self) -> Option<ProtectionKey> {
        self.core.memory().key()
    }

    /// Returns the number of violations since the last call without one. It is counted only with
    /// [`Builder::retire_after`].
    #[must_use]
    pub const fn violations(&self) -> u32 {
        self.violations
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
