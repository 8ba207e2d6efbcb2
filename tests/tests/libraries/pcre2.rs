//! PCRE2 with its just-in-time compiler: code that a library generates and runs in a domain.

use std::io::{Read, Write};

use super::*;

#[repr(C)]
struct Opaque {
    _private: [u8; 0],
}

type Callout = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;

#[link(name = "libpcre2-8.so.0", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C" {
    fn pcre2_compile_8(
        pattern: *const u8,
        length: usize,
        options: u32,
        error: *mut c_int,
        offset: *mut usize,
        context: *mut Opaque,
    ) -> *mut Opaque;
    fn pcre2_jit_compile_8(code: *mut Opaque, options: u32) -> c_int;
    fn pcre2_match_data_create_from_pattern_8(code: *mut Opaque, context: *mut Opaque) -> *mut Opaque;
    fn pcre2_match_context_create_8(context: *mut Opaque) -> *mut Opaque;
    fn pcre2_set_callout_8(context: *mut Opaque, callout: Callout, data: *mut c_void) -> c_int;
    fn pcre2_jit_match_8(
        code: *mut Opaque,
        subject: *const u8,
        length: usize,
        start: usize,
        options: u32,
        data: *mut Opaque,
        context: *mut Opaque,
    ) -> c_int;
    fn pcre2_get_ovector_pointer_8(data: *mut Opaque) -> *mut usize;
    fn pcre2_match_data_free_8(data: *mut Opaque);
    fn pcre2_match_context_free_8(context: *mut Opaque);
    fn pcre2_code_free_8(code: *mut Opaque);
}

unsafe extern "C" fn callout(_: *mut c_void, target: *mut c_void) -> c_int {
    if !target.is_null() {
        scribble(target.cast());
    }
    0
}

/// Finds words with generated code, which calls back at each. Returns where they begin and end.
fn find(text: &[u8], target: *mut u8) -> Vec<(usize, usize)> {
    const PATTERN: &[u8] = br"\b(?:key|rewind|thr\w+)(?C1)\b";
    const COMPLETE: u32 = 1;
    let mut found = Vec::new();
    // SAFETY: the arguments are valid.
    unsafe {
        let (mut error, mut offset) = (0, 0);
        let code = pcre2_compile_8(PATTERN.as_ptr(), PATTERN.len(), 0, &raw mut error, &raw mut offset, null_mut());
        assert!(!code.is_null(), "error {error} at {offset}");
        assert_eq!(pcre2_jit_compile_8(code, COMPLETE), 0);
        let data = pcre2_match_data_create_from_pattern_8(code, null_mut());
        let context = pcre2_match_context_create_8(null_mut());
        pcre2_set_callout_8(context, callout, target.cast());
        let mut start = 0;
        while pcre2_jit_match_8(code, text.as_ptr(), text.len(), start, 0, data, context) > 0 {
            let place = pcre2_get_ovector_pointer_8(data);
            found.push((place.read(), place.add(1).read()));
            start = place.add(1).read();
        }
        pcre2_match_context_free_8(context);
        pcre2_match_data_free_8(data);
        pcre2_code_free_8(code);
    }
    found
}

pub(crate) fn compiles_patterns_to_machine_code() {
    let text = prose(32 * 1024);
    let work = || find(&text, null_mut());
    let mistake = |target| drop(find(&text, target));
    // Its compiler keeps a list of the memory that it has mapped in a static. So this process does not use it outside.
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let status = support::in_child(|| {
        let found = work();
        let bytes: Vec<u8> =
            found.iter().flat_map(|(start, end)| [*start, *end]).flat_map(usize::to_ne_bytes).collect();
        lands(mistake);
        writer.write_all(&bytes).unwrap();
    });
    assert_eq!(status, 0, "control");
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    let numbers: Vec<_> = bytes.as_chunks().0.iter().map(|bytes| usize::from_ne_bytes(*bytes)).collect();
    let expected: Vec<_> = numbers.as_chunks().0.iter().map(|[start, end]| (*start, *end)).collect();
    assert!(expected.len() > 100, "{}", expected.len());
    println!("figure: {} words found by generated code", expected.len());

    // SAFETY: this process uses the library only in that domain.
    let mut domain = build(unsafe { Domain::builder("pcre2").library("libpcre2-8.so.0") });
    works_as_outside(&mut domain, &expected, work);
    let target = Target::new();
    for _ in 0..3 {
        assert_in_scribble(&is_stopped(&mut domain, &target, mistake));
        works_as_outside(&mut domain, &expected, work);
    }
}
