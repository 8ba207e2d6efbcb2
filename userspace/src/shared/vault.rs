//! Memory that no domain can read.

#![expect(unsafe_code, reason = "it keeps a value in memory of its own")]

use std::fmt;

use pkru::ProtectionKey;

use crate::keys::lent::{self, Lent};
use crate::memory::mapping::Mapping;
use crate::rights::with_access;
use crate::setup::process;
use crate::{Error, keys, rights, thread};

/// A value that no domain can read, such as a private key.
///
/// It lies in memory with a protection key to which domains have no rights. The calling thread has rights to it within
/// [`with`](Self::with) and [`with_mut`](Self::with_mut). A thread that is started there, or that is passed the reference,
/// gets them too, and keeps them. All vaults of a process share one key. What the value points to is not in the vault:
/// keep a secret in an array, not in a `Vec`.
///
/// A thread that has never used a vault gets its rights when it first reads the value. A system call that reads it
/// before that fails with EFAULT.
///
/// # Examples
///
/// ```
/// use pkru_userspace::{Domain, Vault};
///
/// # if pkru_userspace::capability::detect().is_err() { return Ok(()) }
/// let secret = Vault::new([7u8; 32])?;
/// assert_eq!(secret.with(|bytes| bytes[0]), 7);
///
/// let address = secret.as_ptr().cast::<u8>();
/// let mut domain = Domain::builder("curious").build()?;
/// // SAFETY: none: this is the mistake.
/// assert!(domain.call(|| unsafe { address.read() }).is_err());
/// # Ok::<(), pkru_userspace::Error>(())
/// ```
pub struct Vault<T> {
    mapping: Mapping<1>,
    key: ProtectionKey,
    value: *mut T,
}

// SAFETY: a vault owns its value, as a box does.
unsafe impl<T: Send> Send for Vault<T> {}
// SAFETY: a shared vault gives shared references to its value.
unsafe impl<T: Sync> Sync for Vault<T> {}

impl<T> Vault<T> {
    /// Moves a value into a vault. Copies made on the way, for instance on the stack, stay outside.
    ///
    /// # Errors
    ///
    /// What the machine lacks, [`Error::KeysExhausted`], or [`Error::System`] if memory is short.
    pub fn new(value: T) -> Result<Self, Error> {
        const { assert!(align_of::<T>() <= 4096, "a value in a vault can be aligned to a page at most") };
        if rights::is_in_domain() {
            return Err(Error::InDomain);
        }
        process::make_ready()?;
        let key = keys::closed(thread::current_caller())?;
        lent::set_key(key);
        let mapping = Mapping::new([size_of::<T>().max(1)])?;
        mapping.make_accessible(key)?;
        let place = mapping.part(0).start as *mut T;
        // SAFETY: the place is mapped, aligned and large enough, and open meanwhile.
        with_access(key, || unsafe { place.write(value) });
        Ok(Self { mapping, key, value: place })
    }

    /// Calls a function with the value.
    pub fn with<R>(&self, function: impl FnOnce(&T) -> R) -> R {
        // SAFETY: the value is there until this is dropped, and open meanwhile.
        self.open(|| function(unsafe { &*self.value }))
    }

    /// Calls a function that may change the value.
    pub fn with_mut<R>(&mut self, function: impl FnOnce(&mut T) -> R) -> R {
        let value = self.value;
        // SAFETY: as in `with`, and this is the only reference.
        self.open(|| function(unsafe { &mut *value }))
    }

    /// Runs a function with rights to the value, which other threads may get meanwhile. In a domain it runs without.
    fn open<R>(&self, function: impl FnOnce() -> R) -> R {
        let _lent = (!rights::is_in_domain()).then(Lent::new);
        with_access(self.key, function)
    }

    /// Returns the address of the value. Read it within [`with`](Self::with) only: elsewhere it faults on a thread that has
    /// no rights to vaults.
    #[must_use]
    pub const fn as_ptr(&self) -> *const T {
        self.value
    }
}

impl<T> Drop for Vault<T> {
    fn drop(&mut self) {
        self.open(|| {
            // SAFETY: the value was written by `new` and is not used after this.
            unsafe { self.value.drop_in_place() };
            let size = self.mapping.part(0).len();
            // SAFETY: the memory is this vault's.
            unsafe { self.value.cast::<u8>().write_bytes(0, size) };
        });
    }
}

impl<T> fmt::Debug for Vault<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = self.mapping.part(0);
        f.debug_struct("Vault").field("addresses", &format_args!("{addresses:#x?}")).finish_non_exhaustive()
    }
}
