//! Functions that open and close descriptors.
//!
//! In a domain they keep the [record](crate::descriptors) of what code there has opened: that alone it can close or replace,
//! and a discard closes it. Outside domains they note that a descriptor is no domain's.
//!
//! What opens in a domain runs there, with its rights: the kernel reads paths, and writes addresses, as the domain may.
//! The child of a vfork(2) in a domain closes and replaces what it wants to.
//!
//! Descriptors that come by recvmsg(2), or that the C library opens and closes for itself, are not recorded.

#![expect(unsafe_code, reason = "it defines C functions")]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem;

use libc::{DIR, FILE, mode_t};

use super::{Next, fail};
use crate::inside::descriptors as inside;
use crate::inside::libc::not_permitted;
use crate::{descriptors, rights};

/// Records a new descriptor, if it is one, and returns it.
fn opened(descriptor: c_int) -> c_int {
    if rights::is_in_domain() {
        return inside::claim(descriptor);
    }
    descriptors::forget(descriptor);
    descriptor
}

macro_rules! opens {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                type Function = unsafe extern "C" fn($($type),*) -> c_int;
                let Some(next) = Next::$name.find() else { return fail(libc::ENOSYS) };
                // SAFETY: this is the address of the C library's function of this name. It has this type, or takes the
                // last argument only if the flags say that it is there.
                let next = unsafe { mem::transmute::<usize, Function>(next) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                opened(unsafe { next($($argument),*) })
            }
        )*
    };
}

opens! {
    /// open(2).
    fn open(path: *const c_char, flags: c_int, mode: mode_t);
    /// open(2).
    fn open64(path: *const c_char, flags: c_int, mode: mode_t);
    /// openat(2).
    fn openat(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t);
    /// openat(2).
    fn openat64(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t);
    /// open(2) with a check.
    fn __open_2(path: *const c_char, flags: c_int);
    /// open(2) with a check.
    fn __open64_2(path: *const c_char, flags: c_int);
    /// openat(2) with a check.
    fn __openat_2(folder: c_int, path: *const c_char, flags: c_int);
    /// openat(2) with a check.
    fn __openat64_2(folder: c_int, path: *const c_char, flags: c_int);
    /// creat(2).
    fn creat(path: *const c_char, mode: mode_t);
    /// creat(2).
    fn creat64(path: *const c_char, mode: mode_t);
    /// dup(2).
    fn dup(descriptor: c_int);
    /// socket(2).
    fn socket(domain: c_int, kind: c_int, protocol: c_int);
    /// accept(2).
    fn accept(socket: c_int, address: *mut c_void, size: *mut c_uint);
    /// accept4(2).
    fn accept4(socket: c_int, address: *mut c_void, size: *mut c_uint, flags: c_int);
    /// eventfd(2).
    fn eventfd(count: c_uint, flags: c_int);
    /// epoll_create(2).
    fn epoll_create(size: c_int);
    /// epoll_create1(2).
    fn epoll_create1(flags: c_int);
    /// timerfd_create(2).
    fn timerfd_create(clock: c_int, flags: c_int);
    /// inotify_init(2).
    fn inotify_init();
    /// inotify_init1(2).
    fn inotify_init1(flags: c_int);
    /// memfd_create(2).
    fn memfd_create(name: *const c_char, flags: c_uint);
    /// pidfd_open(2).
    fn pidfd_open(process: c_int, flags: c_uint);
    /// shm_open(3).
    fn shm_open(name: *const c_char, flags: c_int, mode: mode_t);
    /// posix_openpt(3).
    fn posix_openpt(flags: c_int);
    /// mkstemp(3).
    fn mkstemp(template: *mut c_char);
    /// mkstemp(3).
    fn mkstemp64(template: *mut c_char);
    /// mkostemp(3).
    fn mkostemp(template: *mut c_char, flags: c_int);
    /// mkostemp(3).
    fn mkostemp64(template: *mut c_char, flags: c_int);
    /// mkstemps(3).
    fn mkstemps(template: *mut c_char, length: c_int);
    /// mkstemps(3).
    fn mkstemps64(template: *mut c_char, length: c_int);
    /// mkostemps(3).
    fn mkostemps(template: *mut c_char, length: c_int, flags: c_int);
    /// mkostemps(3).
    fn mkostemps64(template: *mut c_char, length: c_int, flags: c_int);
}

macro_rules! pairs {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) fills $pair:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                type Function = unsafe extern "C" fn($($type),*) -> c_int;
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                if unsafe { next($($argument),*) } != 0 {
                    return -1;
                }
                // SAFETY: the C library has just written it.
                let both = unsafe { $pair.read() };
                if both.map(opened).contains(&-1) { -1 } else { 0 }
            }
        )*
    };
}

pairs! {
    /// pipe(2).
    fn pipe(pair: *mut [c_int; 2]) fills pair;
    /// pipe2(2).
    fn pipe2(pair: *mut [c_int; 2], flags: c_int) fills pair;
    /// socketpair(2).
    fn socketpair(domain: c_int, kind: c_int, protocol: c_int, pair: *mut [c_int; 2]) fills pair;
}

/// signalfd(2).
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn signalfd(descriptor: c_int, mask: *const libc::sigset_t, flags: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_int, *const libc::sigset_t, c_int) -> c_int;
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::signalfd.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    let result = unsafe { next(descriptor, mask, flags) };
    // Otherwise it has changed the descriptor that was passed.
    if descriptor == -1 { opened(result) } else { result }
}

macro_rules! controls {
    ($($name:ident)*) => {
        $(
            /// fcntl(2).
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name(descriptor: c_int, command: c_int, argument: usize) -> c_int {
                type Function = unsafe extern "C" fn(c_int, c_int, usize) -> c_int;
                // SAFETY: this is the address of the C library's function of this name. It takes the last argument, an
                // integer or a pointer, only if the command says that it is there.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                let result = unsafe { next(descriptor, command, argument) };
                if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) { opened(result) } else { result }
            }
        )*
    };
}

controls! { fcntl fcntl64 }

/// Returns the descriptor of an open stream, or -1.
fn file_number(file: *mut FILE) -> c_int {
    // SAFETY: the callers pass an open stream.
    unsafe { libc::fileno(file) }
}

/// Returns the descriptor of an open folder, or -1.
fn folder_number(folder: *mut DIR) -> c_int {
    // SAFETY: the callers pass an open folder.
    unsafe { libc::dirfd(folder) }
}

macro_rules! streams {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty, $number:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> *mut $result {
                type Function = unsafe extern "C" fn($($type),*) -> *mut $result;
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                let stream = unsafe { next($($argument),*) };
                if !stream.is_null() {
                    // Without a record the stream works, and lasts longer than the domain.
                    if rights::is_in_domain() {
                        inside::record($number(stream));
                    } else {
                        descriptors::forget($number(stream));
                    }
                }
                stream
            }
        )*
    };
}

streams! {
    /// fopen(3).
    fn fopen(path: *const c_char, mode: *const c_char) -> FILE, file_number;
    /// fopen(3).
    fn fopen64(path: *const c_char, mode: *const c_char) -> FILE, file_number;
    /// tmpfile(3).
    fn tmpfile() -> FILE, file_number;
    /// tmpfile(3).
    fn tmpfile64() -> FILE, file_number;
    /// opendir(3).
    fn opendir(path: *const c_char) -> DIR, folder_number;
}

macro_rules! ends {
    ($($(#[$doc:meta])* fn $name:ident($type:ty), $number:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// The arguments are valid, as the manual page demands.
            #[cfg_attr(not(instrumented), unsafe(no_mangle))]
            pub(crate) unsafe extern "C" fn $name(stream: *mut $type) -> c_int {
                type Function = unsafe extern "C" fn(*mut $type) -> c_int;
                if !stream.is_null() {
                    if rights::is_in_domain() {
                        inside::release($number(stream));
                    } else {
                        descriptors::forget($number(stream));
                    }
                }
                // SAFETY: this is the address of the C library's function of this name, which has this type.
                let next = unsafe { mem::transmute::<usize, Function>(Next::$name.get()) };
                // SAFETY: this function has the same contract, which the caller fulfils.
                unsafe { next(stream) }
            }
        )*
    };
}

ends! {
    /// fclose(3).
    fn fclose(FILE), file_number;
    /// closedir(3).
    fn closedir(DIR), folder_number;
}

/// close(2). In a domain it fails with EPERM for what the domain has not opened.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn close(descriptor: c_int) -> c_int {
    if rights::is_in_domain() {
        return inside::close(descriptor);
    }
    descriptors::forget(descriptor);
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_int) -> c_int>(Next::close.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(descriptor) }
}

/// dup2(2). In a domain it fails with EPERM if the new descriptor is open and the domain has not opened it.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn dup2(descriptor: c_int, to: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_int, c_int) -> c_int;
    if rights::is_in_domain() {
        return inside::duplicate(descriptor, to, 0);
    }
    if descriptor != to {
        descriptors::forget(to);
    }
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::dup2.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(descriptor, to) }
}

/// dup3(2). In a domain as [`dup2`].
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn dup3(descriptor: c_int, to: c_int, flags: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_int, c_int, c_int) -> c_int;
    if rights::is_in_domain() {
        return if descriptor == to { fail(libc::EINVAL) } else { inside::duplicate(descriptor, to, flags) };
    }
    descriptors::forget(to);
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(Next::dup3.get()) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(descriptor, to, flags) }
}

/// close_range(2). In a domain it fails with EPERM: the program has descriptors in most ranges.
///
/// # Safety
///
/// The arguments are valid, as the manual page demands.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    type Function = unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int;
    /// `CLOSE_RANGE_CLOEXEC`: nothing is closed now.
    const CLOEXEC: c_int = 1 << 2;
    if rights::is_in_domain() {
        if !inside::is_in_copy() {
            return not_permitted();
        }
    } else if first <= last && flags & CLOEXEC == 0 {
        descriptors::forget_all(first, last);
    }
    let Some(next) = Next::close_range.find() else { return fail(libc::ENOSYS) };
    // SAFETY: this is the address of the C library's function of this name, which has this type.
    let next = unsafe { mem::transmute::<usize, Function>(next) };
    // SAFETY: this function has the same contract, which the caller fulfils.
    unsafe { next(first, last, flags) }
}

/// closefrom(3). In a domain it does nothing.
///
/// # Safety
///
/// None.
#[cfg_attr(not(instrumented), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn closefrom(first: c_int) {
    if rights::is_in_domain() {
        if !inside::is_in_copy() {
            not_permitted();
            return;
        }
    } else {
        descriptors::forget_all(first.max(0) as c_uint, c_uint::MAX);
    }
    if let Some(next) = Next::closefrom.find() {
        // SAFETY: this is the address of the C library's function of this name, which has this type.
        let next = unsafe { mem::transmute::<usize, unsafe extern "C" fn(c_int)>(next) };
        // SAFETY: this function has the same contract, which the caller fulfils.
        unsafe { next(first) };
    }
}
