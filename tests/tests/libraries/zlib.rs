//! zlib: compression, and decompression of a stream with an allocator of the program.

use super::*;

type Allocate = unsafe extern "C" fn(*mut c_void, c_uint, c_uint) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void, *mut c_void);

#[repr(C)]
struct Stream {
    next_in: *const u8,
    avail_in: c_uint,
    total_in: c_ulong,
    next_out: *mut u8,
    avail_out: c_uint,
    total_out: c_ulong,
    message: *const c_char,
    state: *mut c_void,
    allocate: Option<Allocate>,
    free: Option<Free>,
    opaque: *mut c_void,
    data_type: c_int,
    adler: c_ulong,
    reserved: c_ulong,
}

const OK: c_int = 0;
const STREAM_END: c_int = 1;

#[link(name = "libz.so.1", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C" {
    fn zlibVersion() -> *const c_char;
    fn compressBound(length: c_ulong) -> c_ulong;
    fn compress2(to: *mut u8, room: *mut c_ulong, from: *const u8, length: c_ulong, level: c_int) -> c_int;
    fn uncompress(to: *mut u8, room: *mut c_ulong, from: *const u8, length: c_ulong) -> c_int;
    fn inflateInit_(stream: *mut Stream, version: *const c_char, size: c_int) -> c_int;
    fn inflate(stream: *mut Stream, flush: c_int) -> c_int;
    fn inflateEnd(stream: *mut Stream) -> c_int;
}

fn pack(text: &[u8], level: c_int) -> Vec<u8> {
    // SAFETY: the buffer has the size that zlib requires.
    unsafe {
        let mut size = compressBound(text.len() as c_ulong);
        let mut packed = vec![0; size as usize];
        let result = compress2(packed.as_mut_ptr(), &raw mut size, text.as_ptr(), text.len() as c_ulong, level);
        assert_eq!(result, OK);
        packed.truncate(size as usize);
        packed
    }
}

fn unpack(packed: &[u8], length: usize) -> Vec<u8> {
    let mut text = vec![0; length];
    let mut size = length as c_ulong;
    // SAFETY: the buffer has this size.
    let result = unsafe { uncompress(text.as_mut_ptr(), &raw mut size, packed.as_ptr(), packed.len() as c_ulong) };
    assert_eq!((result, size as usize), (OK, length));
    text
}

/// The size of an output chunk, in bytes.
const CHUNK: usize = 16 * 1024;

/// Inflates in chunks. From the fourth on, chunks go to `place` if it is given. zlib uses `allocator` if it is given.
fn inflate_in_chunks(packed: &[u8], place: Option<*mut u8>, allocator: Option<&mut Allocator>) -> Vec<u8> {
    let mut text = Vec::new();
    // SAFETY: zlib accepts a zeroed stream. Input and output have the stated sizes.
    unsafe {
        let mut stream = Stream { next_in: packed.as_ptr(), avail_in: packed.len() as c_uint, ..std::mem::zeroed() };
        if let Some(allocator) = allocator {
            stream.allocate = Some(allocate);
            stream.free = Some(free);
            stream.opaque = ptr::from_mut(allocator).cast();
        }
        let size = size_of::<Stream>() as c_int;
        assert_eq!(inflateInit_(&raw mut stream, zlibVersion(), size), OK);
        for number in 0.. {
            let mut chunk = vec![0; CHUNK];
            stream.next_out = place.filter(|_| number >= 3).unwrap_or(chunk.as_mut_ptr());
            stream.avail_out = CHUNK as c_uint;
            let result = inflate(&raw mut stream, 0);
            text.extend_from_slice(&chunk[..CHUNK - stream.avail_out as usize]);
            if result == STREAM_END {
                break;
            }
            assert_eq!(result, OK);
        }
        assert_eq!(inflateEnd(&raw mut stream), OK);
    }
    text
}

/// State of `allocate`. It makes the mistake, if there is one, at its second block.
struct Allocator {
    blocks: u32,
    mistake: Option<*mut u8>,
}

unsafe extern "C" fn allocate(allocator: *mut c_void, items: c_uint, size: c_uint) -> *mut c_void {
    // SAFETY: `inflate_in_chunks` sets the pointer and does not use the allocator meanwhile.
    let allocator = unsafe { &mut *allocator.cast::<Allocator>() };
    allocator.blocks += 1;
    if allocator.blocks == 2 {
        allocator.mistake.into_iter().for_each(scribble);
    }
    // SAFETY: the function has no preconditions.
    unsafe { libc::calloc(items as usize, size as usize) }
}

unsafe extern "C" fn free(_: *mut c_void, block: *mut c_void) {
    // SAFETY: zlib frees blocks that `allocate` returned.
    unsafe { libc::free(block) }
}

pub(crate) fn compresses_and_inflates() {
    const SIZE: usize = 300 * 1024;
    let text = prose(SIZE);
    let work = || {
        let packed: Vec<_> = [1, 6].map(|level| pack(&text, level)).to_vec();
        let unpacked = packed.iter().map(|packed| unpack(packed, SIZE)).collect::<Vec<_>>();
        let streamed = inflate_in_chunks(&packed[1], None, None);
        (packed, unpacked, streamed)
    };
    let mut domain = domain("zlib");
    let expected = work();
    assert!(expected.1.iter().all(|unpacked| *unpacked == text) && expected.2 == text);
    println!("figure: {SIZE} bytes to {} at level 1, {} at level 6", expected.0[0].len(), expected.0[1].len());
    works_as_outside(&mut domain, &expected, work);

    // From the fourth chunk on, the output buffer belongs to the caller.
    let target = Target::new();
    let packed = &expected.0[1];
    let mistake = |place| drop(inflate_in_chunks(packed, Some(place), None));
    assert_in_library(&is_stopped(&mut domain, &target, mistake), "libz.so");
    lands(mistake);
    works_as_outside(&mut domain, &expected, work);
}

pub(crate) fn allocates_by_a_callback() {
    let text = prose(100 * 1024);
    let packed = pack(&text, 6);
    let run = |mistake| {
        let mut allocator = Allocator { blocks: 0, mistake };
        let text = inflate_in_chunks(&packed, None, Some(&mut allocator));
        (text, allocator.blocks)
    };
    let work = || run(None);
    let mut domain = domain("zlib");
    let expected = work();
    assert_eq!(expected, (text.clone(), 2), "zlib allocates its state, and later its window");
    works_as_outside(&mut domain, &expected, work);
    let target = Target::new();
    let mistake = |place| drop(run(Some(place)));
    assert_in_scribble(&is_stopped(&mut domain, &target, mistake));
    lands(mistake);
    works_as_outside(&mut domain, &expected, work);
}
