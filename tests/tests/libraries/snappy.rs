//! Snappy, a C++ library.

use super::*;

const OK: c_int = 0;

#[link(name = "libsnappy.so.1", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C" {
    fn snappy_max_compressed_length(length: usize) -> usize;
    fn snappy_compress(from: *const u8, length: usize, to: *mut u8, room: *mut usize) -> c_int;
    fn snappy_uncompress(from: *const u8, length: usize, to: *mut u8, room: *mut usize) -> c_int;
    fn snappy_uncompressed_length(from: *const u8, length: usize, result: *mut usize) -> c_int;
    fn snappy_validate_compressed_buffer(from: *const u8, length: usize) -> c_int;
}

/// Compresses `length` bytes at `from`.
fn snap(from: *const u8, length: usize) -> Vec<u8> {
    // SAFETY: the buffer has the size that snappy requires. The test chooses whether the input is readable.
    unsafe {
        let mut size = snappy_max_compressed_length(length);
        let mut packed = vec![0; size];
        assert_eq!(snappy_compress(from, length, packed.as_mut_ptr(), &raw mut size), OK);
        packed.truncate(size);
        packed
    }
}

/// Uncompresses to `place`, or to a new buffer.
fn unsnap(packed: &[u8], place: Option<*mut u8>) -> Vec<u8> {
    let (start, length) = (packed.as_ptr(), packed.len());
    // SAFETY: the buffer has this size. A domain must not write `place`.
    unsafe {
        assert_eq!(snappy_validate_compressed_buffer(start, length), OK);
        let mut size = 0;
        assert_eq!(snappy_uncompressed_length(start, length, &raw mut size), OK);
        let mut text = vec![0; size];
        let to = place.unwrap_or(text.as_mut_ptr());
        assert_eq!(snappy_uncompress(start, length, to, &raw mut size), OK);
        text
    }
}

pub(crate) fn compresses_and_uncompresses() {
    let text = prose(300 * 1024);
    let work = || {
        let packed = snap(text.as_ptr(), text.len());
        let unpacked = unsnap(&packed, None);
        (packed, unpacked)
    };
    let mut domain = domain("snappy");
    let expected = work();
    assert!(expected.1 == text);
    println!("figure: {} bytes to {}", text.len(), expected.0.len());
    works_as_outside(&mut domain, &expected, work);

    // Snappy assembles long texts with memcpy and memmove. It writes up to 64 bytes at the end itself.
    let short = [b"rewind".repeat(4), prose(36)].concat();
    let target = Target::new();
    for (text, library) in [(&text, "libc.so"), (&short, "libsnappy.so")] {
        let packed = &snap(text.as_ptr(), text.len());
        let mistake = |place| drop(unsnap(packed, Some(place)));
        assert_in_library(&is_stopped(&mut domain, &target, mistake), library);
        lands(mistake);
        works_as_outside(&mut domain, &expected, work);
    }
}

pub(crate) fn reads_beyond_its_input() {
    const SIZE: usize = 256 * 1024;
    let text = prose(SIZE);
    let mut domain = domain("snappy");
    // SAFETY: the mapping is new. The text fills its first half, and the second half is made inaccessible.
    let start = unsafe {
        let (open, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let start = libc::mmap(null_mut(), 2 * SIZE, open, private, -1, 0);
        assert_ne!(start, libc::MAP_FAILED);
        ptr::copy_nonoverlapping(text.as_ptr(), start.cast(), SIZE);
        assert_eq!(libc::mprotect(start.byte_add(SIZE), SIZE, libc::PROT_NONE), 0);
        start.cast::<u8>()
    };
    let work = || snap(start, SIZE);
    let expected = work();
    works_as_outside(&mut domain, &expected, work);
    let violation = domain.call(|| snap(start, SIZE + 100_000)).unwrap_err();
    println!("figure: {}, in {}", violation.kind(), violation.symbol().unwrap());
    let end = start as u64 + SIZE as u64;
    match *violation.kind() {
        ViolationKind::Unmapped { address, access: Access::Read } => assert!((end..end + 4096).contains(&address)),
        _ => panic!("{violation}"),
    }
    works_as_outside(&mut domain, &expected, work);
    // The control: the same call succeeds once the second half is readable.
    // SAFETY: nothing refers to the second half.
    unsafe { assert_eq!(libc::mprotect(start.byte_add(SIZE).cast(), SIZE, libc::PROT_READ), 0) };
    let longer = snap(start, SIZE + 100_000);
    assert_eq!(unsnap(&longer, None).len(), SIZE + 100_000);
}
