//! Memory that no domain can read.

use std::fmt;

use pkru::registers::Pkru;
use pkru::{AccessRights, ProtectionKey};

use crate::mapping::Mapping;
use crate::process::Process;
use crate::{Error, keys, thread, tls};

/// A value that no domain can read, such as a private key.
///
/// It lies in memory with a protection key to which domains have no rights. The program's threads give themselves
/// rights within [`with`](Self::with) and [`with_mut`](Self::with_mut); a thread that is started there has them for
/// good. All vaults of a process share one key. What the value refers to is not in
/// the vault: keep a secret in an array, not in a `Vec`.
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
    /// Moves a value into a vault. Copies that were made on the way, on the stack for instance, are not in it.
    ///
    /// # Errors
    ///
    /// What is missing on this machine, or that no key or memory is left.
    pub fn new(value: T) -> Result<Self, Error> {
        const { assert!(align_of::<T>() <= 4096, "a value in a vault can be aligned to a page at most") };
        if tls::is_in_domain() {
            return Err(Error::InDomain);
        }
        Process::get()?;
        let key = keys::closed()?;
        let mapping = Mapping::new([size_of::<T>().max(1)])?;
        mapping.open(key)?;
        let place = mapping.part(0).start as *mut T;
        // SAFETY: the place is mapped, aligned and large enough, and open meanwhile.
        open(key, || unsafe { place.write(value) });
        Ok(Self { mapping, key, value: place })
    }

    /// Lets a function see the value.
    pub fn with<R>(&self, function: impl FnOnce(&T) -> R) -> R {
        // SAFETY: the value is there until this is dropped, and open meanwhile.
        open(self.key, || function(unsafe { &*self.value }))
    }

    /// Lets a function change the value.
    pub fn with_mut<R>(&mut self, function: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: as in `with`, and this is the only reference.
        open(self.key, || function(unsafe { &mut *self.value }))
    }

    /// Returns the address of the value, which can be used within [`with`](Self::with) only.
    #[must_use]
    pub const fn as_ptr(&self) -> *const T {
        self.value
    }
}

impl<T> Drop for Vault<T> {
    fn drop(&mut self) {
        open(self.key, || {
            // SAFETY: the value was written by `new` and is not used after this.
            unsafe { self.value.drop_in_place() };
            let size = self.mapping.part(0).len();
            // SAFETY: the memory is this vault's.
            unsafe { self.value.cast::<u8>().write_bytes(0, size) };
        });
    }
}

/// Runs a function with rights to a key, and takes them away again, whatever way it ends.
fn open<R>(key: ProtectionKey, function: impl FnOnce() -> R) -> R {
    struct Close(AccessRights, ProtectionKey);
    impl Drop for Close {
        fn drop(&mut self) {
            set(self.1, self.0);
        }
    }
    fn set(key: ProtectionKey, rights: AccessRights) -> AccessRights {
        // SAFETY: there is a vault only after the process's capability check has found PKU.
        let register = unsafe { Pkru::assume() };
        let before = register.read();
        // SAFETY: nothing but vaults has the key, and they are used only where they are open.
        unsafe { register.write(before.with(key, rights)) };
        before.get(key)
    }
    // In a domain the access is to be stopped, and not to be made possible.
    if thread::is_a_domains() {
        return function();
    }
    let _close = Close(set(key, AccessRights::READ_WRITE), key);
    function()
}

impl<T> fmt::Debug for Vault<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = self.mapping.part(0);
        f.debug_struct("Vault").field("addresses", &format_args!("{addresses:#x?}")).finish_non_exhaustive()
    }
}
