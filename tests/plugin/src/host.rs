//! A program that knows nothing of domains and opens a library that has some. The arguments are the library's path, and
//! that of a copy.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a few C calls read better as one block")]

use std::ffi::{CStr, CString, c_void};

struct Plugin {
    open: extern "C" fn() -> i32,
    call: extern "C" fn(bool) -> i32,
    close: extern "C" fn(),
}

impl Plugin {
    fn new(path: String) -> Self {
        let path = CString::new(path).unwrap();
        // SAFETY: the library's constructors do nothing.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        // SAFETY: after a failure it returns a text.
        assert!(!library.is_null(), "{:?}", unsafe { CStr::from_ptr(libc::dlerror()) });
        let function = |name: &CStr| {
            // SAFETY: the handle is open, and the name is NUL-terminated.
            let function = unsafe { libc::dlsym(library, name.as_ptr()) };
            assert!(!function.is_null(), "the library has no {name:?}");
            function
        };
        Self {
            // SAFETY: the function has this type.
            open: unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> i32>(function(c"plugin_open")) },
            // SAFETY: as above.
            call: unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(bool) -> i32>(function(c"plugin_call")) },
            // SAFETY: as above.
            close: unsafe { std::mem::transmute::<*mut c_void, extern "C" fn()>(function(c"plugin_close")) },
        }
    }

    fn check(&self) {
        assert_eq!([false, true, false].map(|fail| (self.call)(fail)), [4950, -1, 4950]);
    }
}

fn main() {
    let [path, copy] = [1, 2].map(|index| std::env::args().nth(index).expect("two paths"));
    let before: Vec<_> = (0..100).map(|number| vec![number; 1000]).collect();
    let plugin = Plugin::new(path);
    assert_eq!((plugin.open)(), 0, "the domain is built");
    (0..3).for_each(|_| plugin.check());
    drop(before);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| plugin.check());
        }
    });
    // A second copy of the crate cannot route malloc to itself.
    assert_eq!((Plugin::new(copy).open)(), 1, "it fails, and says why");
    plugin.check();
    (plugin.close)();
    // Outside domains everything is as before.
    // SAFETY: the child only faults.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: deliberately unsound: the process ends.
        unsafe { std::hint::black_box(0x120 as *mut u8).write_volatile(1) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status & 0x7f, libc::SIGSEGV);
    println!("the plugin works");
}
