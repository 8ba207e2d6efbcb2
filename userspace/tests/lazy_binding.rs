//! Libraries with lazy binding: the loader binds each function at its first call.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

use pkru_userspace::Domain;
use support::{build, contain, domain, mistake, suite, works};

suite! {
    a_library_that_binds_lazily_works_at_once,
    a_library_that_binds_lazily_is_given_away,
}

/// Compresses data with zlib. Returns zlib's result and the size.
///
/// Debian links zlib with lazy binding. The first call of malloc or memcpy through an unbound slot would make the
/// loader write memory that a domain may not write.
fn compress_something() -> (i32, u64) {
    #[link(name = "z")]
    unsafe extern "C" {
        fn compress(out: *mut u8, out_size: *mut libc::c_ulong, data: *const u8, size: libc::c_ulong) -> libc::c_int;
    }
    let (data, mut out) = ([7u8; 5000], vec![0u8; 5000]);
    let mut size = out.len() as libc::c_ulong;
    // SAFETY: both buffers have these sizes.
    let result = unsafe { compress(out.as_mut_ptr(), &raw mut size, data.as_ptr(), data.len() as libc::c_ulong) };
    (result, size)
}

fn a_library_that_binds_lazily_works_at_once() {
    let mut domain = domain("lazy");
    let (result, size) = domain.call(compress_something).unwrap();
    assert!(result == 0 && size < 100, "{result}, {size} bytes");
    assert_eq!(compress_something(), (result, size), "control");
}

fn a_library_that_binds_lazily_is_given_away() {
    // SAFETY: nothing else uses the library while the domain lives.
    let mut domain = build(unsafe { Domain::builder("lazy").library("libz.so") });
    for _ in 0..2 {
        assert_eq!(domain.call(compress_something).unwrap().0, 0);
        contain(&mut domain, mistake);
    }
    // Binding other libraries does not access the data of zlib, even if the domain has lost its key.
    let others: Vec<_> = (0..20).map(|_| support::domain("other")).collect();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let library = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|file| file.contains("libz.so"));
    let copy = std::env::temp_dir().join(format!("libcopy-{}.so", std::process::id()));
    std::fs::create_dir_all(std::env::temp_dir()).unwrap();
    std::fs::copy(library.unwrap(), &copy).unwrap();
    let name = std::ffi::CString::new(copy.to_str().unwrap()).unwrap();
    // SAFETY: zlib's constructors have no preconditions.
    assert!(!unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) }.is_null());
    std::fs::remove_file(&copy).unwrap();
    works(&mut support::domain("later"));
    drop(others);
    assert_eq!(domain.call(compress_something).unwrap().0, 0);
    drop(domain);
    assert_eq!(compress_something().0, 0);
}
