//! Debian's libraries in a domain, unmodified: each does real work there, is stopped by a mistake in the middle of it, and works
//! again.
//!
//! Each result is compared with that of the same work outside a domain. Each mistake is made with the library's own code on the
//! stack: in a write of the library's, or in a function that the library calls back. Its control is the same mistake outside.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

#[path = "../../userspace/tests/common/mod.rs"]
#[macro_use]
mod common;

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::fmt::Debug;
use std::mem::ManuallyDrop;
use std::ptr::{self, null, null_mut};

use common::{build, domain, key_fault};
use pkru_userspace::transfer::Transfer;
use pkru_userspace::{Access, Domain, ProtectionKey, Violation, ViolationKind};

/// Memory of the caller's that the mistakes are aimed at. It is never freed.
struct Target(*mut u8);

impl Target {
    /// Room for what each mistake writes, so that the controls do no harm.
    const ROOM: usize = 512 * 1024;
    const FILL: u8 = 0x5a;

    fn new() -> Self {
        Self(Vec::leak(vec![Self::FILL; Self::ROOM]).as_mut_ptr())
    }

    fn is_untouched(&self) -> bool {
        // SAFETY: the block has that many bytes, and nothing writes them meanwhile.
        unsafe { std::slice::from_raw_parts(self.0, Self::ROOM) }.iter().all(|byte| *byte == Self::FILL)
    }
}

/// Makes a mistake in a domain, and checks that its write to the target is stopped.
#[track_caller]
fn is_stopped(domain: &mut Domain, target: &Target, mistake: impl Fn(*mut u8)) -> Violation {
    let violation = domain.call(|| mistake(target.0)).expect_err("it must be stopped");
    let fault = key_fault(&violation);
    assert_eq!((fault.access, fault.key), (Access::Write, ProtectionKey::DEFAULT), "{violation}");
    let start = target.0 as u64;
    assert!((start..start + Target::ROOM as u64).contains(&fault.address), "{violation}");
    assert!(target.is_untouched(), "{violation}");
    let place = violation.symbol().expect("it is loaded code");
    println!("figure: stopped in {place}, at byte {} of the caller's", fault.address - start);
    violation
}

/// The control: makes a mistake outside a domain, and checks that its write lands.
#[track_caller]
fn lands(mistake: impl Fn(*mut u8)) {
    let target = Target::new();
    mistake(target.0);
    assert!(!target.is_untouched(), "the control did not write");
}

/// Checks that work in a domain has the result that it has outside.
#[track_caller]
fn works_as_outside<R: Transfer + PartialEq + Debug>(domain: &mut Domain, expected: &R, work: impl Fn() -> R) {
    let result = domain.call(work).expect("nothing is wrong with it");
    assert!(result == *expected, "the result differs from that outside");
}

/// The mistake of a function that a library calls.
#[inline(never)]
fn scribble(target: *mut u8) {
    // SAFETY: none: this is the mistake.
    unsafe { target.write_volatile(0) };
}

/// Checks whose instruction was stopped: that of a library, by the beginning of its file's name.
#[track_caller]
fn assert_in_library(violation: &Violation, name: &str) {
    let symbol = violation.symbol().expect("it is in a library");
    let file = symbol.library().file_name().unwrap().to_string_lossy();
    assert!(file.starts_with(name), "{violation}");
}

#[track_caller]
fn assert_in_scribble(violation: &Violation) {
    let symbol = violation.symbol().expect("it is in the program");
    assert!(symbol.name().unwrap().contains("scribble"), "{violation}");
}

/// Numbers that look random, and are the same each time: xorshift.
fn numbers() -> impl Iterator<Item = u32> {
    let mut state = 0x2545_f491_u32;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    })
}

/// Text that compresses about as well as prose does.
fn prose(size: usize) -> Vec<u8> {
    const WORDS: &str = "key domain the rewind a page of fault register in heap stack is caller write thread";
    let words: Vec<_> = WORDS.split_inclusive(' ').collect();
    let mut text: Vec<u8> = numbers().flat_map(|n| words[n as usize % words.len()].bytes()).take(size).collect();
    // Something that cannot be predicted, now and then.
    text.iter_mut().zip(numbers()).step_by(37).for_each(|(byte, n)| *byte = n as u8);
    text
}

mod libpng {
    use super::*;

    #[repr(C)]
    struct Image {
        opaque: *mut c_void,
        version: u32,
        width: u32,
        height: u32,
        format: u32,
        flags: u32,
        colormap_entries: u32,
        warning_or_error: u32,
        message: [c_char; 64],
    }

    const VERSION: u32 = 1;
    const FORMAT_RGB: u32 = 2;
    const FORMAT_RGBA: u32 = 3;
    type Read = unsafe extern "C" fn(*mut c_void, *mut u8, usize);

    #[link(name = "libpng16.so.16", kind = "dylib", modifiers = "+verbatim")]
    unsafe extern "C" {
        fn png_image_begin_read_from_memory(image: *mut Image, data: *const u8, size: usize) -> c_int;
        fn png_image_finish_read(
            image: *mut Image,
            background: *const c_void,
            buffer: *mut u8,
            row_stride: i32,
            colormap: *mut c_void,
        ) -> c_int;
        fn png_image_write_to_memory(
            image: *mut Image,
            memory: *mut u8,
            size: *mut usize,
            to_8_bit: c_int,
            buffer: *const u8,
            row_stride: i32,
            colormap: *const c_void,
        ) -> c_int;

        fn png_get_libpng_ver(png: *const c_void) -> *const c_char;
        fn png_create_read_struct(
            version: *const c_char,
            error_pointer: *mut c_void,
            error: *const c_void,
            warning: *const c_void,
        ) -> *mut c_void;
        fn png_create_info_struct(png: *mut c_void) -> *mut c_void;
        fn png_set_read_fn(png: *mut c_void, pointer: *mut c_void, read: Read);
        fn png_get_io_ptr(png: *mut c_void) -> *mut c_void;
        fn png_read_info(png: *mut c_void, info: *mut c_void);
        fn png_get_rowbytes(png: *mut c_void, info: *mut c_void) -> usize;
        fn png_get_image_height(png: *mut c_void, info: *mut c_void) -> u32;
        fn png_read_row(png: *mut c_void, row: *mut u8, display_row: *mut u8);
        fn png_destroy_read_struct(png: *mut *mut c_void, info: *mut *mut c_void, end: *mut *mut c_void);
    }

    const PICTURES: [&[u8]; 3] = [
        include_bytes!("../../userspace/examples/data/disc.png"),
        include_bytes!("../../userspace/examples/data/gradient.png"),
        include_bytes!("../../userspace/examples/data/stripes.png"),
    ];

    /// Decodes a PNG file, at a place of its own or where it is told to.
    fn decode(file: &[u8], format: u32, place: Option<*mut u8>) -> (u32, u32, Vec<u8>) {
        // SAFETY: zeroes are the empty image that libpng asks for.
        let mut image = Image { version: VERSION, ..unsafe { std::mem::zeroed() } };
        // SAFETY: the file lives across both calls, and the buffer has room for the picture. The target is where it must not write.
        unsafe {
            assert_ne!(png_image_begin_read_from_memory(&raw mut image, file.as_ptr(), file.len()), 0);
            image.format = format;
            let mut pixels = vec![0; image.width as usize * image.height as usize * 4];
            let buffer = place.unwrap_or(pixels.as_mut_ptr());
            assert_ne!(png_image_finish_read(&raw mut image, null(), buffer, 0, null_mut()), 0);
            (image.width, image.height, pixels)
        }
    }

    fn encode(width: u32, height: u32, pixels: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64 * 1024];
        let mut size = file.len();
        // SAFETY: zeroes are the empty image that libpng asks for; there are as many pixels as it is told, and as much room.
        unsafe {
            let mut image = Image { version: VERSION, width, height, format: FORMAT_RGBA, ..std::mem::zeroed() };
            let (file, pixels) = (file.as_mut_ptr(), pixels.as_ptr());
            assert_ne!(png_image_write_to_memory(&raw mut image, file, &raw mut size, 0, pixels, 0, null()), 0);
        }
        file.truncate(size);
        file
    }

    #[test]
    fn decodes_and_encodes() {
        let work = || {
            let both = |file| {
                let (width, height, pixels) = decode(file, FORMAT_RGBA, None);
                let file = encode(width, height, &pixels);
                (pixels, file)
            };
            PICTURES.map(both).to_vec()
        };
        let mut domain = need!(domain("libpng"));
        let expected = work();
        for (pixels, file) in &expected {
            assert!(decode(file, FORMAT_RGBA, None).2 == *pixels, "it decodes what it has encoded");
            println!("figure: {} bytes of pixels in a file of {}", pixels.len(), file.len());
        }
        works_as_outside(&mut domain, &expected, work);

        // The buffer for the pixels is the caller's.
        let target = Target::new();
        // Finished rows are copied with memcpy; a picture without its transparency is blended by libpng pixel by pixel.
        let cases = [(0, FORMAT_RGB, "libpng16.so"), (0, FORMAT_RGBA, "libc.so"), (1, FORMAT_RGBA, "libc.so")];
        for (index, format, library) in cases {
            let mistake = |place| drop(decode(PICTURES[index], format, Some(place)));
            assert_in_library(&is_stopped(&mut domain, &target, mistake), library);
            lands(mistake);
            works_as_outside(&mut domain, &expected, work);
        }
    }

    /// A file in memory that libpng reads from by a function of its caller's.
    struct Source<'a> {
        rest: &'a [u8],
        reads: u32,
        /// Where the next read writes what it must not.
        mistake: Option<*mut u8>,
    }

    unsafe extern "C" fn read(png: *mut c_void, buffer: *mut u8, length: usize) {
        // SAFETY: `decode_rows` has set the pointer, and does not use the source meanwhile; the buffer has that many bytes.
        unsafe {
            let source = &mut *png_get_io_ptr(png).cast::<Source<'_>>();
            source.reads += 1;
            if let Some(place) = source.mistake.take() {
                scribble(place);
            }
            let (bytes, rest) = source.rest.split_at(length);
            ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, length);
            source.rest = rest;
        }
    }

    /// Decodes a PNG file row by row; the first read for a row makes the mistake. Returns how many reads there were, and the rows.
    fn decode_rows(file: &[u8], mistake: Option<*mut u8>) -> (u32, Vec<u8>) {
        let mut source = Source { rest: file, reads: 0, mistake: None };
        let source = &raw mut source;
        // SAFETY: the calls are in the order that libpng asks for; a row is as long as it says, and the source lives.
        unsafe {
            let mut png = png_create_read_struct(png_get_libpng_ver(null()), null_mut(), null(), null());
            let mut info = png_create_info_struct(png);
            png_set_read_fn(png, source.cast(), read);
            png_read_info(png, info);
            let (length, height) = (png_get_rowbytes(png, info), png_get_image_height(png, info));
            let mut rows = vec![0; length * height as usize];
            (*source).mistake = mistake;
            rows.chunks_mut(length).for_each(|row| png_read_row(png, row.as_mut_ptr(), null_mut()));
            png_destroy_read_struct(&raw mut png, &raw mut info, null_mut());
            ((*source).reads, rows)
        }
    }

    #[test]
    fn reads_by_a_callback() {
        let mut domain = need!(domain("libpng"));
        let work = || PICTURES.map(|file| decode_rows(file, None)).to_vec();
        let expected = work();
        works_as_outside(&mut domain, &expected, work);

        let target = Target::new();
        for (file, expected) in PICTURES.into_iter().zip(&expected) {
            let mistake = |place| drop(decode_rows(file, Some(place)));
            assert_in_scribble(&is_stopped(&mut domain, &target, mistake));
            lands(mistake);
            works_as_outside(&mut domain, expected, || decode_rows(file, None));
        }
    }
}

mod zlib {
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
        // SAFETY: the buffer has the room that zlib asks for.
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
        // SAFETY: the buffer has as much room as zlib is told.
        let result = unsafe { uncompress(text.as_mut_ptr(), &raw mut size, packed.as_ptr(), packed.len() as c_ulong) };
        assert_eq!((result, size as usize), (OK, length));
        text
    }

    /// The bytes that zlib puts out at a time.
    const CHUNK: usize = 16 * 1024;

    /// Inflates in chunks; those from the fourth on go where they are told to. zlib allocates by an allocator of ours, if there is one.
    fn inflate_in_chunks(packed: &[u8], place: Option<*mut u8>, allocator: Option<&mut Allocator>) -> Vec<u8> {
        let mut text = Vec::new();
        // SAFETY: zeroes are the stream that zlib asks for; input and output have as many bytes as it is told.
        unsafe {
            let mut stream =
                Stream { next_in: packed.as_ptr(), avail_in: packed.len() as c_uint, ..std::mem::zeroed() };
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

    /// What `allocate` is told: it makes the mistake at its second block.
    struct Allocator {
        blocks: u32,
        mistake: Option<*mut u8>,
    }

    unsafe extern "C" fn allocate(allocator: *mut c_void, items: c_uint, size: c_uint) -> *mut c_void {
        // SAFETY: `inflate_in_chunks` has set the pointer, and does not use the allocator meanwhile.
        let allocator = unsafe { &mut *allocator.cast::<Allocator>() };
        allocator.blocks += 1;
        if allocator.blocks == 2 {
            allocator.mistake.into_iter().for_each(scribble);
        }
        // SAFETY: it has no preconditions.
        unsafe { libc::calloc(items as usize, size as usize) }
    }

    unsafe extern "C" fn free(_: *mut c_void, block: *mut c_void) {
        // SAFETY: zlib frees what it has allocated above.
        unsafe { libc::free(block) }
    }

    #[test]
    fn compresses_and_inflates() {
        const SIZE: usize = 300 * 1024;
        let text = prose(SIZE);
        let work = || {
            let packed: Vec<_> = [1, 6].map(|level| pack(&text, level)).to_vec();
            let unpacked = packed.iter().map(|packed| unpack(packed, SIZE)).collect::<Vec<_>>();
            let streamed = inflate_in_chunks(&packed[1], None, None);
            (packed, unpacked, streamed)
        };
        let mut domain = need!(domain("zlib"));
        let expected = work();
        assert!(expected.1.iter().all(|unpacked| *unpacked == text) && expected.2 == text);
        println!("figure: {SIZE} bytes to {} at level 1, {} at level 6", expected.0[0].len(), expected.0[1].len());
        works_as_outside(&mut domain, &expected, work);

        // From the fourth chunk on the output buffer is the caller's.
        let target = Target::new();
        let packed = &expected.0[1];
        let mistake = |place| drop(inflate_in_chunks(packed, Some(place), None));
        assert_in_library(&is_stopped(&mut domain, &target, mistake), "libz.so");
        lands(mistake);
        works_as_outside(&mut domain, &expected, work);
    }

    #[test]
    fn allocates_by_a_callback() {
        let text = prose(100 * 1024);
        let packed = pack(&text, 6);
        let run = |mistake| {
            let mut allocator = Allocator { blocks: 0, mistake };
            let text = inflate_in_chunks(&packed, None, Some(&mut allocator));
            (text, allocator.blocks)
        };
        let work = || run(None);
        let mut domain = need!(domain("zlib"));
        let expected = work();
        assert_eq!(expected, (text.clone(), 2), "a state, and a window in the middle of the work");
        works_as_outside(&mut domain, &expected, work);
        let target = Target::new();
        let mistake = |place| drop(run(Some(place)));
        assert_in_scribble(&is_stopped(&mut domain, &target, mistake));
        lands(mistake);
        works_as_outside(&mut domain, &expected, work);
    }
}

mod libwebp {
    use super::*;

    /// `WebPConfig`, which only libwebp looks into: 116 bytes, and some more.
    #[repr(C, align(8))]
    struct Config([u8; 256]);

    type Writer = unsafe extern "C" fn(*const u8, usize, *const Picture) -> c_int;
    type ProgressHook = unsafe extern "C" fn(c_int, *const Picture) -> c_int;

    /// `WebPPicture`, as `webp/encode.h` of 1.2.4 has it.
    #[repr(C)]
    struct Picture {
        use_argb: c_int,
        colorspace: c_int,
        width: c_int,
        height: c_int,
        yuv: [*mut u8; 3],
        yuv_strides: [c_int; 2],
        alpha: *mut u8,
        alpha_stride: c_int,
        pad1: [u32; 2],
        argb: *mut u32,
        argb_stride: c_int,
        pad2: [u32; 3],
        writer: Option<Writer>,
        writer_data: *mut c_void,
        extra_info_type: c_int,
        extra_info: *mut u8,
        statistics: *mut c_void,
        error: c_int,
        progress: Option<ProgressHook>,
        progress_data: *mut c_void,
        pad3: [u32; 3],
        pad4: [*mut u8; 2],
        pad6: [u32; 8],
        memory: [*mut c_void; 2],
        pad7: [*mut c_void; 2],
    }

    /// `WEBP_ENCODER_ABI_VERSION`
    const VERSION: c_int = 0x20f;

    #[link(name = "libwebp.so.7", kind = "dylib", modifiers = "+verbatim")]
    unsafe extern "C" {
        fn WebPEncodeRGBA(
            pixels: *const u8,
            width: c_int,
            height: c_int,
            stride: c_int,
            quality: f32,
            output: *mut *mut u8,
        ) -> usize;
        fn WebPDecodeRGBA(file: *const u8, size: usize, width: *mut c_int, height: *mut c_int) -> *mut u8;
        fn WebPDecodeRGBAInto(file: *const u8, size: usize, output: *mut u8, room: usize, stride: c_int) -> *mut u8;
        fn WebPFree(block: *mut c_void);
        fn WebPConfigInitInternal(config: *mut Config, preset: c_int, quality: f32, version: c_int) -> c_int;
        fn WebPPictureInitInternal(picture: *mut Picture, version: c_int) -> c_int;
        fn WebPPictureImportRGBA(picture: *mut Picture, pixels: *const u8, stride: c_int) -> c_int;
        fn WebPEncode(config: *const Config, picture: *mut Picture) -> c_int;
        fn WebPPictureFree(picture: *mut Picture);
    }

    const WIDTH: usize = 128;
    const HEIGHT: usize = 96;

    /// A picture with a gradient, noise and an edge.
    fn picture() -> Vec<u8> {
        let mut noise = numbers();
        let pixel = |n: usize| {
            let (x, y) = (n % WIDTH, n / WIDTH);
            [(x * 2) as u8, (y * 2) as u8 ^ (noise.next().unwrap() as u8 & 7), if x > y { 200 } else { 30 }, 255]
        };
        (0..WIDTH * HEIGHT).flat_map(pixel).collect()
    }

    fn encode(pixels: &[u8]) -> Vec<u8> {
        let mut file = null_mut();
        // SAFETY: there are as many pixels as it is told; what it returns has that many bytes, and is freed once.
        unsafe {
            let size = WebPEncodeRGBA(
                pixels.as_ptr(),
                WIDTH as c_int,
                HEIGHT as c_int,
                4 * WIDTH as c_int,
                75.0,
                &raw mut file,
            );
            assert_ne!(size, 0);
            let copy = std::slice::from_raw_parts(file, size).to_vec();
            WebPFree(file.cast());
            copy
        }
    }

    fn decode(file: &[u8]) -> Vec<u8> {
        let (mut width, mut height) = (0, 0);
        // SAFETY: what it returns has four bytes for each pixel, and is freed once.
        unsafe {
            let pixels = WebPDecodeRGBA(file.as_ptr(), file.len(), &raw mut width, &raw mut height);
            assert_eq!((width as usize, height as usize, pixels.is_null()), (WIDTH, HEIGHT, false));
            let copy = std::slice::from_raw_parts(pixels, 4 * WIDTH * HEIGHT).to_vec();
            WebPFree(pixels.cast());
            copy
        }
    }

    /// Decodes to where it is told to.
    fn decode_into(file: &[u8], place: *mut u8) {
        // SAFETY: there is room for the picture. The target is where it must not write.
        let result =
            unsafe { WebPDecodeRGBAInto(file.as_ptr(), file.len(), place, 4 * WIDTH * HEIGHT, 4 * WIDTH as c_int) };
        assert_eq!(result, place);
    }

    /// What libwebp tells its caller while it encodes.
    struct Progress {
        steps: u32,
        written: usize,
        mistake: Option<*mut u8>,
    }

    unsafe extern "C" fn progress(percent: c_int, picture: *const Picture) -> c_int {
        // SAFETY: `encode_with_callbacks` has set the pointer, and does not use the value meanwhile.
        let progress = unsafe { &mut *(*picture).progress_data.cast::<Progress>() };
        progress.steps += 1;
        if percent >= 50 {
            progress.mistake.into_iter().for_each(scribble);
        }
        1
    }

    unsafe extern "C" fn count_written(_: *const u8, size: usize, picture: *const Picture) -> c_int {
        // SAFETY: as in `progress`.
        unsafe { (*(*picture).progress_data.cast::<Progress>()).written += size };
        1
    }

    /// Encodes with callbacks, of which one makes the mistake half way. Returns how often it was called, and the file's size.
    fn encode_with_callbacks(pixels: &[u8], mistake: Option<*mut u8>) -> (u32, u64) {
        let mut report = Progress { steps: 0, written: 0, mistake };
        let report = &raw mut report;
        // SAFETY: zeroes are plain values that libwebp replaces; there are as many pixels as it is told, and the report lives.
        unsafe {
            let mut config: Config = std::mem::zeroed();
            let mut picture: Picture = std::mem::zeroed();
            assert_eq!(WebPConfigInitInternal(&raw mut config, 0, 75.0, VERSION), 1);
            assert_eq!(WebPPictureInitInternal(&raw mut picture, VERSION), 1);
            (picture.width, picture.height) = (WIDTH as c_int, HEIGHT as c_int);
            assert_eq!(WebPPictureImportRGBA(&raw mut picture, pixels.as_ptr(), 4 * WIDTH as c_int), 1);
            picture.writer = Some(count_written);
            picture.progress = Some(progress);
            picture.progress_data = report.cast();
            assert_eq!(WebPEncode(&raw const config, &raw mut picture), 1, "{}", picture.error);
            WebPPictureFree(&raw mut picture);
            ((*report).steps, (*report).written as u64)
        }
    }

    /// Debian's libwebp locks a mutex in a static before each look at a table that is filled at first use, whether it is filled or not.
    #[test]
    fn without_its_data_it_cannot_work() {
        let pixels = picture();
        let is_the_lock = |domain: &mut Domain, work: &dyn Fn() -> Vec<u8>| {
            let violation = domain.call(work).expect_err("it writes a static");
            assert_eq!(key_fault(&violation).access, Access::Write);
            let (target, symbol) = (violation.target().expect("a static"), violation.symbol().expect("a function"));
            assert!(target.library().to_string_lossy().contains("libwebp.so"), "{violation}");
            assert_eq!(symbol.name(), Some("pthread_mutex_lock"), "{violation}");
            let text = violation.to_string();
            assert!(text.contains("Builder::library"), "{text}");
            println!("figure: {}: {symbol} writes {target}", violation.domain());
        };
        let mut cold = need!(domain("cold"));
        is_the_lock(&mut cold, &|| encode(&pixels));
        let file = encode(&pixels);
        let mut warm = need!(build(Domain::builder("warm").warm_up(|| decode(&file))));
        is_the_lock(&mut warm, &|| encode(&pixels));
        is_the_lock(&mut warm, &|| decode(&file));
    }

    #[test]
    fn with_its_data_it_encodes_and_decodes() {
        let pixels = picture();
        let mut cold = need!(domain("cold"));
        cold.call(|| encode(&pixels)).unwrap_err();
        let work = || {
            let file = encode(&pixels);
            let decoded = decode(&file);
            let told = encode_with_callbacks(&pixels, None);
            (file, decoded, told)
        };
        // While the domain has the library's data, nobody else may use it: so what is outside comes first.
        let expected = work();
        let file = &expected.0;
        let difference = pixels.iter().zip(&expected.1).map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>();
        assert!(difference < 10 * pixels.len() as u64, "it is the picture, but for what is lost");
        println!("figure: {} bytes of pixels in a file of {}, off by {difference} in all", pixels.len(), file.len());
        println!("figure: {} reports of progress", expected.2.0);
        let decode_wrong = |place| decode_into(file, place);
        let encode_wrong = |place| {
            encode_with_callbacks(&pixels, Some(place));
        };
        lands(decode_wrong);
        lands(encode_wrong);

        // SAFETY: from here on this process uses the library in that domain only.
        let mut domain = need!(build(unsafe { Domain::builder("libwebp").library("libwebp.so") }));
        works_as_outside(&mut domain, &expected, work);
        let target = Target::new();
        assert_in_library(&is_stopped(&mut domain, &target, decode_wrong), "libwebp.so");
        works_as_outside(&mut domain, &expected, work);
        assert_in_scribble(&is_stopped(&mut domain, &target, encode_wrong));
        works_as_outside(&mut domain, &expected, work);
    }
}

mod sqlite {
    use super::*;

    type Function = unsafe extern "C" fn(*mut c_void, c_int, *mut *mut c_void);

    const OK: c_int = 0;
    const MISUSE: c_int = 21;
    const ROW: c_int = 100;
    const DONE: c_int = 101;
    const UTF8: c_int = 1;
    /// `SQLITE_TRANSIENT`: it copies the text.
    const TRANSIENT: *const c_void = usize::MAX as *const c_void;

    #[link(name = "libsqlite3.so.0", kind = "dylib", modifiers = "+verbatim")]
    unsafe extern "C" {
        fn sqlite3_open(name: *const c_char, database: *mut *mut c_void) -> c_int;
        fn sqlite3_close(database: *mut c_void) -> c_int;
        fn sqlite3_exec(
            database: *mut c_void,
            sql: *const c_char,
            row: *const c_void,
            argument: *mut c_void,
            message: *mut *mut c_char,
        ) -> c_int;
        fn sqlite3_prepare_v2(
            database: *mut c_void,
            sql: *const c_char,
            length: c_int,
            statement: *mut *mut c_void,
            rest: *mut *const c_char,
        ) -> c_int;
        fn sqlite3_bind_int64(statement: *mut c_void, index: c_int, value: i64) -> c_int;
        fn sqlite3_bind_text(
            statement: *mut c_void,
            index: c_int,
            text: *const u8,
            length: c_int,
            destructor: *const c_void,
        ) -> c_int;
        fn sqlite3_step(statement: *mut c_void) -> c_int;
        fn sqlite3_reset(statement: *mut c_void) -> c_int;
        fn sqlite3_column_text(statement: *mut c_void, column: c_int) -> *const c_char;
        fn sqlite3_column_int64(statement: *mut c_void, column: c_int) -> i64;
        fn sqlite3_finalize(statement: *mut c_void) -> c_int;
        fn sqlite3_create_function(
            database: *mut c_void,
            name: *const c_char,
            arguments: c_int,
            encoding: c_int,
            data: *mut c_void,
            function: Option<Function>,
            step: Option<Function>,
            last: Option<unsafe extern "C" fn(*mut c_void)>,
        ) -> c_int;
        fn sqlite3_user_data(context: *mut c_void) -> *mut c_void;
        fn sqlite3_value_int64(value: *mut c_void) -> i64;
        fn sqlite3_result_int64(context: *mut c_void, value: i64);
    }

    /// A database in memory.
    struct Database(*mut c_void);

    impl Database {
        fn open() -> Self {
            let mut database = null_mut();
            // SAFETY: the name is a C string, and the place is writable.
            assert_eq!(unsafe { sqlite3_open(c":memory:".as_ptr(), &raw mut database) }, OK);
            Self(database)
        }

        /// A database with a table of a thousand rows.
        fn filled() -> Self {
            let database = Self::open();
            database.run(c"create table word (id integer primary key, text text, weight integer)");
            database.run(c"begin");
            let insert = database.prepare(c"insert into word (text, weight) values (?1, ?2)");
            for (number, noise) in numbers().take(1000).enumerate() {
                let text = format!("word {:04} of {number}", noise % 5000);
                // SAFETY: the statement is prepared, and the text is as long as it is told.
                unsafe {
                    let (start, length) = (text.as_ptr(), text.len() as c_int);
                    sqlite3_bind_text(insert, 1, start, length, TRANSIENT);
                    sqlite3_bind_int64(insert, 2, i64::from(noise >> 16));
                    assert_eq!(sqlite3_step(insert), DONE);
                    sqlite3_reset(insert);
                }
            }
            // SAFETY: the statement is not used again.
            unsafe { sqlite3_finalize(insert) };
            database.run(c"commit; create index by_text on word (text)");
            database
        }

        fn run(&self, sql: &CStr) {
            assert_eq!(self.run_and_tell(sql, null_mut()), OK);
        }

        /// Runs statements; at the end SQLite writes at `message` what was wrong with them, or null, unless that is null itself.
        fn run_and_tell(&self, sql: &CStr, message: *mut u8) -> c_int {
            // SAFETY: the database is open, or SQLite finds that it is not. The target is where it must not write.
            unsafe { sqlite3_exec(self.0, sql.as_ptr(), null(), null_mut(), message.cast()) }
        }

        fn prepare(&self, sql: &CStr) -> *mut c_void {
            let mut statement = null_mut();
            // SAFETY: the database is open, and the place is writable.
            let result = unsafe { sqlite3_prepare_v2(self.0, sql.as_ptr(), -1, &raw mut statement, null_mut()) };
            assert_eq!(result, OK);
            statement
        }

        /// Returns the rows of a query for a text and a number.
        fn rows(&self, sql: &CStr) -> Vec<(String, i64)> {
            let query = self.prepare(sql);
            let mut rows = Vec::new();
            // SAFETY: the statement is prepared, and has a row; its text is a C string until the next step.
            unsafe {
                while sqlite3_step(query) == ROW {
                    let text = CStr::from_ptr(sqlite3_column_text(query, 0));
                    rows.push((text.to_str().unwrap().to_owned(), sqlite3_column_int64(query, 1)));
                }
                sqlite3_finalize(query);
            }
            rows
        }

        /// Defines a function in SQL which returns its argument, and makes the mistake, if there is one, in the middle of the table.
        fn define_identity(&self, mistake: *mut u8) {
            unsafe extern "C" fn identity(context: *mut c_void, _: c_int, arguments: *mut *mut c_void) {
                // SAFETY: it has one argument, and the data is the pointer that was given.
                unsafe {
                    let (value, place) = (sqlite3_value_int64(*arguments), sqlite3_user_data(context));
                    if value == 500 && !place.is_null() {
                        scribble(place.cast());
                    }
                    sqlite3_result_int64(context, value);
                }
            }
            let name = c"identity".as_ptr();
            // SAFETY: the database is open, and the function is of the type that SQLite expects.
            let result = unsafe {
                let identity: Function = identity;
                sqlite3_create_function(self.0, name, 1, UTF8, mistake.cast(), Some(identity), None, None)
            };
            assert_eq!(result, OK);
        }
    }

    impl Drop for Database {
        fn drop(&mut self) {
            // SAFETY: the database is open, and all its statements are finalized.
            assert_eq!(unsafe { sqlite3_close(self.0) }, OK);
        }
    }

    /// Fills a table and queries it, with a function of ours in the query.
    fn query_words() -> Vec<(String, i64)> {
        let database = Database::filled();
        database.define_identity(null_mut());
        let mut rows = database.rows(c"select text, identity(id) from word where weight % 97 = 0 order by text desc");
        rows.extend(database.rows(c"select group_concat(distinct substr(text, 6, 2)), sum(weight) from word"));
        rows
    }

    /// The mistake of a function that SQLite calls for each row of a query.
    fn query_with_mistake(place: *mut u8) {
        let database = Database::filled();
        database.define_identity(place);
        assert_eq!(database.rows(c"select 'sum', sum(identity(id)) from word")[0].1, 500_500);
    }

    /// SQLite's own write: of whether there was a mistake in the statements, while it holds the database's lock.
    fn insert_with_mistake(place: *mut u8) {
        let database = Database::filled();
        let sql = c"begin; insert into word (text, weight) select text, weight + 1 from word; commit";
        assert_eq!(database.run_and_tell(sql, place), OK);
    }

    /// Makes a domain that has SQLite's data, after the controls; returns also the result of the work outside.
    ///
    /// So SQLite has already set itself up outside, as in a program that has used it.
    fn domain_with_sqlite() -> Option<(Domain, Vec<(String, i64)>)> {
        drop(domain("first")?);
        let expected = query_words();
        lands(query_with_mistake);
        lands(insert_with_mistake);
        // SAFETY: from here on this process uses the library in that domain only.
        Some((build(unsafe { Domain::builder("sqlite").library("libsqlite3.so") })?, expected))
    }

    #[test]
    fn fills_and_queries_a_table() {
        let (mut domain, expected) = need!(domain_with_sqlite());
        let sum = expected.last().unwrap().1;
        println!("figure: {} rows of 1000 in the answer, and a sum of {sum}", expected.len() - 1);
        works_as_outside(&mut domain, &expected, query_words);
        let target = Target::new();
        assert_in_scribble(&is_stopped(&mut domain, &target, query_with_mistake));
        works_as_outside(&mut domain, &expected, query_words);
        assert_in_library(&is_stopped(&mut domain, &target, insert_with_mistake), "libsqlite3.so");
        works_as_outside(&mut domain, &expected, query_words);
    }

    #[test]
    fn a_database_lasts_from_call_to_call_until_a_violation() {
        let (mut domain, _) = need!(domain_with_sqlite());
        let open = || {
            let database = Database::filled();
            let handle = database.0 as usize;
            std::mem::forget(database);
            handle
        };
        let handle = domain.call(open).unwrap();
        let kept = || ManuallyDrop::new(Database(handle as *mut c_void));
        let delete_some = || {
            kept().run(c"delete from word where id in (select id from word limit 10)");
            kept().rows(c"select 'rows', count(*) from word")[0].1
        };
        assert_eq!([domain.call(delete_some).unwrap(), domain.call(delete_some).unwrap()], [990, 980]);
        is_stopped(&mut domain, &Target::new(), query_with_mistake);
        let result = domain.call(|| kept().run_and_tell(c"select 1", null_mut()));
        assert_eq!(result.unwrap(), MISUSE, "nothing is left of the database");
    }

    /// The bytes that this process has in memory.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[test]
    fn fifty_mistakes_leave_nothing_behind() {
        let (mut domain, expected) = need!(domain_with_sqlite());
        let target = Target::new();
        let mut round = |number| {
            let mistake = if number % 2 == 0 { query_with_mistake } else { insert_with_mistake };
            domain.call(|| mistake(target.0)).expect_err("it must be stopped");
            works_as_outside(&mut domain, &expected, query_words);
            resident()
        };
        let first = [round(0), round(1)];
        let last = (2..50).map(round).last().unwrap();
        println!("figure: resident after 2 mistakes: {} KiB, after 50: {} KiB", first[1] / 1024, last / 1024);
        assert!(last < first[1] + (256 << 10));
        assert!(target.is_untouched());
    }
}

mod snappy {
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

    /// Compresses bytes that begin at an address.
    fn snap(from: *const u8, length: usize) -> Vec<u8> {
        // SAFETY: the buffer has the room that snappy asks for. Whether the bytes are there is up to the test.
        unsafe {
            let mut size = snappy_max_compressed_length(length);
            let mut packed = vec![0; size];
            assert_eq!(snappy_compress(from, length, packed.as_mut_ptr(), &raw mut size), OK);
            packed.truncate(size);
            packed
        }
    }

    /// Uncompresses to a place of its own, or where it is told to.
    fn unsnap(packed: &[u8], place: Option<*mut u8>) -> Vec<u8> {
        let (start, length) = (packed.as_ptr(), packed.len());
        // SAFETY: the buffer has as much room as snappy is told. The target is where it must not write.
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

    #[test]
    fn compresses_and_uncompresses() {
        let text = prose(300 * 1024);
        let work = || {
            let packed = snap(text.as_ptr(), text.len());
            let unpacked = unsnap(&packed, None);
            (packed, unpacked)
        };
        let mut domain = need!(domain("snappy"));
        let expected = work();
        assert!(expected.1 == text);
        println!("figure: {} bytes to {}", text.len(), expected.0.len());
        works_as_outside(&mut domain, &expected, work);

        // Long texts are put together with memcpy and memmove; up to 64 bytes at the end of a text snappy writes itself if it can.
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

    #[test]
    fn reads_beyond_its_input() {
        const SIZE: usize = 256 * 1024;
        let text = prose(SIZE);
        let mut domain = need!(domain("snappy"));
        // SAFETY: a new mapping, of which the text fills the first half; the second is closed.
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
        // SAFETY: nothing refers to what follows the text. The control: the same act is good once there is something to read.
        unsafe { assert_eq!(libc::mprotect(start.byte_add(SIZE).cast(), SIZE, libc::PROT_READ), 0) };
        let longer = snap(start, SIZE + 100_000);
        assert_eq!(unsnap(&longer, None).len(), SIZE + 100_000);
    }
}
