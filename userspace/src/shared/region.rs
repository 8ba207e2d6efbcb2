//! Memory that several domains share.

#![expect(unsafe_code, reason = "it copies memory that domains may be writing")]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use pkru::{AccessRights, ProtectionKey};

use crate::memory::mapping::Mapping;
use crate::setup::process;
use crate::sys::{self, Inaccessible};
use crate::{Error, keys, rights, thread};

/// Memory with a protection key of its own, shared by named domains. Each of them may read it, or read and write it.
///
/// Other domains have no access. The program copies bytes in and out, because domains on other threads may write the
/// region at any time. A region keeps one of the 15 keys as long as it lives.
///
/// # Examples
///
/// ```
/// use pkru_userspace::{Domain, Region, RegionAccess};
///
/// # if pkru_userspace::capability::detect().is_err() { return Ok(()) }
/// let region = Region::new(4096)?;
/// let mut producer = Domain::builder("producer").region(&region, RegionAccess::ReadWrite).build()?;
/// let mut consumer = Domain::builder("consumer").region(&region, RegionAccess::ReadOnly).build()?;
/// let first = region.as_ptr();
/// // SAFETY: the region is mapped while it lives; that a domain may use it is what this is about.
/// producer.call(|| unsafe { first.write(42) }).expect("it may write");
/// // SAFETY: as above.
/// assert_eq!(consumer.call(|| unsafe { first.read() }).expect("it may read"), 42);
/// assert!(consumer.call(|| unsafe { first.write(1) }).is_err());
/// # Ok::<(), pkru_userspace::Error>(())
/// ```
#[derive(Clone)]
pub struct Region(Arc<Shared>);

/// What a domain may do with a [`Region`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RegionAccess {
    /// Read it.
    ReadOnly,
    /// Read and write it.
    ReadWrite,
}

impl RegionAccess {
    pub(crate) const fn rights(self) -> AccessRights {
        match self {
            Self::ReadOnly => AccessRights::READ_ONLY,
            Self::ReadWrite => AccessRights::READ_WRITE,
        }
    }
}

struct Shared {
    mapping: Option<Mapping<1>>,
    key: ProtectionKey,
}

// SAFETY: the memory is only ever copied from and to.
unsafe impl Sync for Shared {}

impl Region {
    /// Maps a zeroed region of `size` bytes, rounded up to pages, at least one page.
    ///
    /// # Errors
    ///
    /// What the machine lacks, [`Error::Size`], [`Error::KeysExhausted`], or [`Error::System`] if memory is short.
    pub fn new(size: usize) -> Result<Self, Error> {
        if rights::is_in_domain() {
            return Err(Error::InDomain);
        }
        let limit = sys::physical_memory();
        if size > limit {
            return Err(Error::Size { part: "region", requested: size, minimum: 0, limit });
        }
        process::make_ready()?;
        let mapping = Mapping::new([size.max(1)])?;
        let key = keys::take_for_good(thread::current_caller())?;
        if let Err(error) = mapping.make_accessible(key) {
            // Some pages may carry it.
            give_back(mapping, key);
            return Err(error);
        }
        Ok(Self(Arc::new(Shared { mapping: Some(mapping), key })))
    }

    /// Returns the first address, for code in domains. The program itself copies with [`read`](Self::read) and
    /// [`write`](Self::write).
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.addresses().start as *mut u8
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.addresses().len()
    }

    /// Copies bytes out of the region.
    ///
    /// # Panics
    ///
    /// If they are not all in it, or a domain has unmapped them.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.place(offset, bytes.len());
        self.with_rights(|| sys::copy_bytes_from(from, bytes));
    }

    /// Copies bytes into the region.
    ///
    /// # Panics
    ///
    /// If they do not all fit, or a domain has unmapped the place.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.place(offset, bytes.len());
        // SAFETY: the range is the region's, which is only ever copied from and to.
        self.with_rights(|| unsafe { sys::copy_to(bytes.as_ptr(), to, bytes.len()) });
    }

    pub(crate) fn key(&self) -> ProtectionKey {
        self.0.key
    }

    fn mapping(&self) -> &Mapping<1> {
        self.0.mapping.as_ref().expect("it is there until it is dropped")
    }

    fn addresses(&self) -> Range<usize> {
        self.mapping().part(0)
    }

    fn place(&self, offset: usize, length: usize) -> usize {
        let range = self.addresses();
        let fits = offset.checked_add(length).is_some_and(|end| end <= range.len());
        assert!(fits, "{length} bytes at {offset} do not fit into a region of {} bytes", range.len());
        range.start + offset
    }

    fn with_rights(&self, mut copy: impl FnMut() -> Result<(), Inaccessible>) {
        if !rights::has(self.0.key) {
            rights::allow(self.0.key);
        }
        if copy().is_err() {
            // A domain may have changed the protection of the pages.
            let again = self.mapping().make_accessible(self.0.key).map(|()| copy());
            assert!(matches!(again, Ok(Ok(()))), "a domain has unmapped the region");
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            give_back(mapping, self.key);
        }
    }
}

/// Gives back the key of a region, once nothing carries it any more.
fn give_back(mapping: Mapping<1>, key: ProtectionKey) {
    let mut mapping = Some(mapping);
    keys::give_back_after(key, move || {
        mapping = mapping.take().and_then(|mapping| mapping.unmap().err());
        mapping.is_none()
    });
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = self.addresses();
        f.debug_struct("Region").field("key", &self.0.key).field("addresses", &format_args!("{addresses:#x?}")).finish()
    }
}
