//! libffi: closures, which are functions that a library makes at run time.

use super::*;

#[repr(C)]
struct Interface {
    abi: c_uint,
    count: c_uint,
    arguments: *const *const c_void,
    result: *const c_void,
    bytes: c_uint,
    flags: c_uint,
}

type Body = unsafe extern "C" fn(*mut Interface, *mut c_void, *mut *mut c_void, *mut c_void);

#[link(name = "libffi.so.8", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C" {
    static ffi_type_sint32: [u64; 3];
    fn ffi_prep_cif(
        interface: *mut Interface,
        abi: c_uint,
        count: c_uint,
        result: *const c_void,
        arguments: *const *const c_void,
    ) -> c_int;
    fn ffi_closure_alloc(size: usize, code: *mut *mut c_void) -> *mut c_void;
    fn ffi_closure_free(closure: *mut c_void);
    fn ffi_prep_closure_loc(
        closure: *mut c_void,
        interface: *mut Interface,
        body: Body,
        data: *mut c_void,
        code: *mut c_void,
    ) -> c_int;
}

/// What a closure captures.
struct Captured {
    add: i32,
    target: *mut u8,
}

/// Adds what the closure has captured to its argument.
unsafe extern "C" fn body(_: *mut Interface, result: *mut c_void, arguments: *mut *mut c_void, data: *mut c_void) {
    // SAFETY: `call` passes this data, and calls the closure with an `int`.
    unsafe {
        let captured = &*data.cast::<Captured>();
        if !captured.target.is_null() {
            scribble(captured.target);
        }
        result.cast::<i64>().write(i64::from(**arguments.cast::<*mut i32>() + captured.add));
    }
}

/// Makes closures and calls them.
fn call(target: *mut u8) -> Vec<i32> {
    const UNIX64: c_uint = 2;
    /// Not less than the size of libffi's `ffi_closure`.
    const SIZE: usize = 64;
    // SAFETY: the arguments are valid.
    unsafe {
        let integer = (&raw const ffi_type_sint32).cast::<c_void>();
        let mut interface: Interface = std::mem::zeroed();
        assert_eq!(ffi_prep_cif(&raw mut interface, UNIX64, 1, integer, &raw const integer), 0);
        let mut results = Vec::new();
        for add in 0..50 {
            let captured = Captured { add, target };
            let mut code = null_mut();
            let closure = ffi_closure_alloc(SIZE, &raw mut code);
            assert!(!closure.is_null());
            let data = (&raw const captured).cast_mut().cast();
            assert_eq!(ffi_prep_closure_loc(closure, &raw mut interface, body, data, code), 0);
            let function: extern "C" fn(i32) -> i32 = std::mem::transmute(code);
            results.push(function(1000));
            // Some stay.
            if add % 3 == 0 {
                ffi_closure_free(closure);
            }
        }
        results
    }
}

pub(crate) fn makes_closures() {
    let work = || call(null_mut());
    let expected: Vec<_> = (1000..1050).collect();
    let mistake = |target| drop(call(target));
    // It keeps a list of the memory that it has mapped in a static. So this process does not use it outside.
    let status = support::in_child(|| {
        assert_eq!(work(), expected);
        lands(mistake);
    });
    assert_eq!(status, 0, "control");

    // It looks for its own code with fopen(3), which writes a static of the C library's.
    // SAFETY: this process uses the library only in that domain, and nothing is left in statics that the program uses.
    let builder = unsafe { Domain::builder("libffi").library("libffi.so.8").globals(Globals::Writable) };
    let mut domain = build(builder);
    works_as_outside(&mut domain, &expected, work);
    let target = Target::new();
    for _ in 0..3 {
        assert_in_scribble(&is_stopped(&mut domain, &target, mistake));
        works_as_outside(&mut domain, &expected, work);
    }
}
