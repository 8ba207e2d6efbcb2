//! The dynamic loader: loaded objects and the addresses of symbols.

#![expect(unsafe_code, reason = "it calls the dynamic loader")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::ops::Range;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fork::is_forking;
use super::memory::page_size;
use super::signals::BlockedSignals;
use crate::trusted::trusted;

/// A loaded object: the executable, a library, or the kernel's vDSO. A library stays loaded while this value exists.
#[derive(Debug)]
pub(crate) struct Library {
    /// The loader's path of the object; empty for the executable.
    pub(crate) name: CString,
    /// The load address: the difference between addresses in memory and in the file.
    pub(crate) base: usize,
    /// The loaded segments.
    pub(crate) segments: Vec<Segment>,
    /// The RELRO range, if there is one: the loader makes it read-only after relocation.
    read_only_after: Option<Range<usize>>,
    /// The dynamic section, if there is one.
    pub(crate) dynamic: Option<Range<usize>>,
    /// The thread-local variables, if there are any.
    pub(crate) tls: Option<TlsModule>,
    /// Keeps a library loaded. The executable and the vDSO are never unloaded.
    pin: Option<Pin>,
}

/// A reference to a loaded library.
#[derive(Debug)]
struct Pin(NonNull<c_void>);

// SAFETY: any thread may use and close a handle of dlopen(3).
unsafe impl Send for Pin {}
// SAFETY: as above.
unsafe impl Sync for Pin {}

impl Pin {
    fn new(name: &CStr) -> Option<Self> {
        // SAFETY: with RTLD_NOLOAD, dlopen loads nothing and runs no constructor.
        NonNull::new(unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) }).map(Self)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // SAFETY: `new` opened the handle, and only this closes it.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

/// A loaded segment.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) addresses: Range<usize>,
    pub(crate) executable: bool,
    pub(crate) writable: bool,
}

/// The thread-local variables of an object.
#[derive(Debug, Clone)]
pub(crate) struct TlsModule {
    /// The loader's module ID, from 1.
    pub(crate) id: usize,
    /// The address of the calling thread's block, if it is allocated.
    pub(crate) block: Option<usize>,
    /// The address of the initialisation image, and its size in bytes.
    pub(crate) image: (usize, usize),
    /// The size of a block in bytes.
    pub(crate) size: usize,
    /// The alignment of a block in bytes.
    pub(crate) align: usize,
}

impl Library {
    /// Returns whether an address lies in a segment.
    pub(crate) fn contains(&self, address: usize) -> bool {
        self.segments.iter().any(|segment| segment.addresses.contains(&address))
    }

    /// Returns the addresses of the read-only segment that an address lies in.
    pub(crate) fn constants_at(&self, address: usize) -> Option<Range<usize>> {
        let mut segments = self.segments.iter().filter(|segment| !segment.writable).map(|segment| &segment.addresses);
        segments.find(|segment| segment.contains(&address)).cloned()
    }

    /// Returns the addresses of the segment that an address lies in.
    pub(crate) fn segment_at(&self, address: usize) -> Option<Range<usize>> {
        let mut segments = self.segments.iter().map(|segment| &segment.addresses);
        segments.find(|segment| segment.contains(&address)).cloned()
    }

    /// Returns whether an address lies in an executable segment.
    pub(crate) fn has_code_at(&self, address: usize) -> bool {
        self.segments.iter().any(|segment| segment.executable && segment.addresses.contains(&address))
    }

    /// Returns the pages of the writable data.
    pub(crate) fn writable_pages(&self) -> Vec<Range<usize>> {
        let page = page_size();
        let writable = self.segments.iter().filter(|segment| segment.writable).map(|segment| &segment.addresses);
        let pages = writable.map(|addresses| {
            let mut start = addresses.start & !(page - 1);
            // A page that RELRO covers only in part stays writable.
            if let Some(relro) = self.read_only_after.as_ref().filter(|relro| addresses.contains(&relro.start)) {
                start = relro.end & !(page - 1);
            }
            start..addresses.end.next_multiple_of(page)
        });
        pages.filter(|pages| !pages.is_empty()).collect()
    }

    /// Returns whether a file begins like the object does in memory: with the same headers and build ID.
    pub(crate) fn begins_like(&self, file: &[u8]) -> bool {
        let Some(first) = self.segments.first().filter(|first| !first.writable) else { return false };
        let length = first.addresses.len().min(page_size()).min(file.len());
        // SAFETY: the segment is loaded while this value exists, and never written.
        let loaded = unsafe { slice::from_raw_parts(first.addresses.start as *const u8, length) };
        length != 0 && loaded == &file[..length]
    }

    /// Returns the path of the file.
    pub(crate) fn path(&self) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        match self.name.as_bytes() {
            [] => std::env::current_exe().unwrap_or_default(),
            name => std::ffi::OsStr::from_bytes(name).into(),
        }
    }
}

trusted! { static ITERATING: Mutex<()> = Mutex::new(()); }

/// Keeps this crate's other threads from iterating over the loaded objects.
///
/// An iteration holds a lock of the loader. In a child that is forked meanwhile that lock stays locked (glibc 2.36,
/// `elf/dl-iteratephdr.c`). The caller blocks signals, because their handlers may fork.
pub(crate) fn lock_loader() -> MutexGuard<'static, ()> {
    ITERATING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls a function for each loaded object, with `data`.
fn iterate(function: unsafe extern "C" fn(*mut libc::dl_phdr_info, usize, *mut c_void) -> c_int, data: *mut c_void) {
    // In a fork handler this thread holds the lock already.
    let _alone = (!is_forking()).then(lock_loader);
    // SAFETY: each caller passes the `data` that its function expects, and it outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(function), data) };
}

/// Returns the loaded objects, the executable first.
pub(crate) fn libraries() -> Vec<Library> {
    let mut libraries: Vec<Library> = Vec::new();
    let quiet = BlockedSignals::new();
    iterate(collect, (&raw mut libraries).cast());
    drop(quiet);
    // Pinning waits until the loader has released its lock. A library that another thread has closed meanwhile cannot
    // be pinned and is left out.
    libraries.retain_mut(|library| {
        library.pin = Pin::new(&library.name);
        library.pin.is_some() || library.name.is_empty()
    });
    libraries
}

/// Updates the calling thread's dynamic thread vector up to a module of a loaded library. Returns the address of the
/// module's block, which it allocates at first use.
///
/// # Safety
///
/// The module is that of a library which stays loaded meanwhile.
pub(crate) unsafe fn touch_module(id: usize) -> Option<usize> {
    #[repr(C)]
    struct Index {
        module: usize,
        offset: usize,
    }
    let function = lookup(c"__tls_get_addr")?;
    // SAFETY: the ABI defines this type for `__tls_get_addr`.
    let function =
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const Index) -> usize>(function.as_ptr()) };
    let index = Index { module: id, offset: 0 };
    // SAFETY: the caller passes the module of a loaded library.
    Some(unsafe { function(&raw const index) })
}

/// Returns how many times objects were loaded and unloaded. The number changes whenever the set of loaded objects does.
///
/// The caller blocks signals, as for [`lock_loader`].
pub(crate) fn loaded_count() -> u64 {
    unsafe extern "C" fn first(info: *mut libc::dl_phdr_info, _: usize, data: *mut c_void) -> c_int {
        // SAFETY: the loader passes a valid struct.
        let info = unsafe { &*info };
        let count = info.dlpi_adds + info.dlpi_subs;
        // SAFETY: `data` points to `count` below.
        unsafe { data.cast::<u64>().write(count) };
        1
    }
    let mut count = 0u64;
    iterate(first, (&raw mut count).cast());
    count
}

unsafe extern "C" fn collect(info: *mut libc::dl_phdr_info, _: usize, data: *mut c_void) -> c_int {
    // SAFETY: the loader passes a valid struct.
    let info = unsafe { &*info };
    // SAFETY: `data` points to the vector in `libraries`, and only this function uses it during the iteration.
    let libraries = unsafe { &mut *data.cast::<Vec<Library>>() };
    // SAFETY: `dlpi_phdr` points to `dlpi_phnum` program headers.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let base = info.dlpi_addr as usize;
    let addresses = |header: &libc::Elf64_Phdr| {
        let start = base + header.p_vaddr as usize;
        start..start + header.p_memsz as usize
    };
    let find = |kind: u32| headers.iter().find(|header| header.p_type == kind);
    let segments = headers.iter().filter(|header| header.p_type == libc::PT_LOAD).map(|header| Segment {
        addresses: addresses(header),
        executable: header.p_flags & libc::PF_X != 0,
        writable: header.p_flags & libc::PF_W != 0,
    });
    let tls = find(libc::PT_TLS).map(|header| TlsModule {
        id: info.dlpi_tls_modid,
        block: NonNull::new(info.dlpi_tls_data).map(|block| block.as_ptr() as usize),
        image: (base + header.p_vaddr as usize, header.p_filesz as usize),
        size: header.p_memsz as usize,
        align: (header.p_align as usize).max(1),
    });
    let name = if info.dlpi_name.is_null() {
        CString::default()
    } else {
        // SAFETY: the loader's names are NUL-terminated.
        unsafe { CStr::from_ptr(info.dlpi_name) }.to_owned()
    };
    libraries.push(Library {
        name,
        base,
        segments: segments.collect(),
        read_only_after: find(libc::PT_GNU_RELRO).map(addresses),
        dynamic: find(libc::PT_DYNAMIC).map(addresses),
        tls,
        pin: None,
    });
    0
}

/// Finds a symbol by name in the loader's default search order.
pub(crate) fn lookup(name: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: the name is NUL-terminated.
    NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) })
}

impl Library {
    /// Resolves a reference of this library to the symbol `name`, with a version if the reference has one.
    pub(crate) fn resolve(&self, name: &CStr, version: Option<&CStr>) -> Option<NonNull<c_void>> {
        let in_scope = |scope: *mut c_void| {
            NonNull::new(match version {
                // SAFETY: the strings are NUL-terminated, and the scope is RTLD_DEFAULT or an open handle.
                Some(version) => unsafe { libc::dlvsym(scope, name.as_ptr(), version.as_ptr()) },
                // SAFETY: as above.
                None => unsafe { libc::dlsym(scope, name.as_ptr()) },
            })
        };
        // A library that was opened with RTLD_LOCAL has a scope of its own, which is searched after the global one.
        in_scope(libc::RTLD_DEFAULT).or_else(|| in_scope(self.pin.as_ref()?.0.as_ptr()))
    }
}

impl Library {
    /// Returns the address of a symbol that this object defines, or that it would bind first among those that it needs.
    pub(crate) fn definition(&self, name: &CStr) -> Option<usize> {
        let handle = self.pin.as_ref()?.0.as_ptr();
        // SAFETY: the handle is open, and the name is NUL-terminated.
        NonNull::new(unsafe { libc::dlsym(handle, name.as_ptr()) }).map(|found| found.as_ptr().addr())
    }

    /// Keeps the object loaded until the process ends.
    pub(crate) fn keep_loaded(&self) {
        let flags = libc::RTLD_NOLOAD | libc::RTLD_LAZY | libc::RTLD_NODELETE;
        // SAFETY: with RTLD_NOLOAD, dlopen loads nothing and runs no constructor.
        unsafe { libc::dlopen(self.name.as_ptr(), flags) };
    }

    /// Returns the pages that the loader makes read-only after relocation, if there are any.
    pub(crate) fn relro(&self) -> Option<Range<usize>> {
        let relro = self.read_only_after.as_ref()?;
        let page = page_size();
        // A page that is covered only in part stays writable.
        let pages = relro.start & !(page - 1)..relro.end & !(page - 1);
        (!pages.is_empty()).then_some(pages)
    }
}

/// Returns the addresses of the next definition of a symbol after this object's own, with a version if one is given.
pub(crate) fn next_symbol(name: &CStr, version: Option<&CStr>) -> Option<Range<usize>> {
    /// Makes `dladdr1` return the symbol's entry in the symbol table.
    const RTLD_DL_SYMENT: c_int = 1;
    unsafe extern "C" {
        fn dladdr1(address: *const c_void, info: *mut libc::Dl_info, extra: *mut *mut c_void, flags: c_int) -> c_int;
    }
    let found = match version {
        // SAFETY: the strings are NUL-terminated.
        Some(version) => unsafe { libc::dlvsym(libc::RTLD_NEXT, name.as_ptr(), version.as_ptr()) },
        // SAFETY: as above.
        None => unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) },
    };
    let start = NonNull::new(found)?.as_ptr() as usize;
    // SAFETY: `Dl_info` is a C struct of pointers, which may be null.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    let mut entry: *mut libc::Elf64_Sym = std::ptr::null_mut();
    // SAFETY: `dladdr1` writes only to `info` and `entry`.
    let found = unsafe { dladdr1(start as *const c_void, &raw mut info, (&raw mut entry).cast(), RTLD_DL_SYMENT) };
    // SAFETY: the pointer is null, or points into the symbol table of a loaded object.
    let size = unsafe { entry.as_ref() }.filter(|_| found != 0)?.st_size;
    Some(start..start + size as usize)
}

/// Returns the start of the function that contains an address, according to the unwind tables.
pub(crate) fn function_at(address: u64) -> Option<u64> {
    /// libgcc's `struct dwarf_eh_bases`.
    #[repr(C)]
    struct Bases {
        text: usize,
        data: usize,
        function: usize,
    }
    unsafe extern "C" {
        fn _Unwind_Find_FDE(address: *const c_void, bases: *mut Bases) -> *const c_void;
    }
    let mut bases = Bases { text: 0, data: 0, function: 0 };
    // SAFETY: libgcc compares the address and does not follow it, and writes only to `bases`.
    let found = unsafe { _Unwind_Find_FDE(address as *const c_void, &raw mut bases) };
    (!found.is_null()).then_some(bases.function as u64)
}

/// Runs the one-time initialisation of libgcc's unwinder. It writes statics, which code in a domain cannot.
pub(crate) fn prepare_unwinding() {
    unsafe extern "C" fn stop(_: *mut c_void, _: *mut c_void) -> c_int {
        /// `_URC_END_OF_STACK`
        const END: c_int = 5;
        END
    }
    unsafe extern "C" {
        fn _Unwind_Backtrace(
            visit: unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int,
            argument: *mut c_void,
        ) -> c_int;
    }
    // SAFETY: `stop` touches no memory, and ends the walk at the first frame.
    unsafe { _Unwind_Backtrace(stop, std::ptr::null_mut()) };
}

/// Finds the next definition of a symbol after this object's own.
pub(crate) fn lookup_next(name: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: the name is NUL-terminated.
    NonNull::new(unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) })
}
