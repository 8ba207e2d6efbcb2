//! libpng: decoding and encoding, decoding to a buffer of the caller, and reading through a callback.

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
    include_bytes!("../../../userspace/examples/data/disc.png"),
    include_bytes!("../../../userspace/examples/data/gradient.png"),
    include_bytes!("../../../userspace/examples/data/stripes.png"),
];

/// Decodes a PNG file to `place`, or to a new buffer.
fn decode(file: &[u8], format: u32, place: Option<*mut u8>) -> (u32, u32, Vec<u8>) {
    // SAFETY: libpng requires a zeroed image.
    let mut image = Image { version: VERSION, ..unsafe { std::mem::zeroed() } };
    // SAFETY: the file lives across both calls, and the buffer has room for the picture. A domain must not write
    // `place`.
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
    // SAFETY: libpng requires a zeroed image. The sizes of the buffers are as stated.
    unsafe {
        let mut image = Image { version: VERSION, width, height, format: FORMAT_RGBA, ..std::mem::zeroed() };
        let (file, pixels) = (file.as_mut_ptr(), pixels.as_ptr());
        assert_ne!(png_image_write_to_memory(&raw mut image, file, &raw mut size, 0, pixels, 0, null()), 0);
    }
    file.truncate(size);
    file
}

pub(crate) fn decodes_and_encodes() {
    let work = || {
        let both = |file| {
            let (width, height, pixels) = decode(file, FORMAT_RGBA, None);
            let file = encode(width, height, &pixels);
            (pixels, file)
        };
        PICTURES.map(both).to_vec()
    };
    let mut domain = domain("libpng");
    let expected = work();
    for (pixels, file) in &expected {
        assert!(decode(file, FORMAT_RGBA, None).2 == *pixels, "an encoded picture decodes to the same pixels");
        println!("figure: {} bytes of pixels in a file of {}", pixels.len(), file.len());
    }
    works_as_outside(&mut domain, &expected, work);

    // The buffer for the pixels belongs to the caller.
    let target = Target::new();
    // libpng copies finished rows with memcpy. To remove transparency it blends and writes each pixel itself.
    let cases = [(0, FORMAT_RGB, "libpng16.so"), (0, FORMAT_RGBA, "libc.so"), (1, FORMAT_RGBA, "libc.so")];
    for (index, format, library) in cases {
        let mistake = |place| drop(decode(PICTURES[index], format, Some(place)));
        assert_in_library(&is_stopped(&mut domain, &target, mistake), library);
        lands(mistake);
        works_as_outside(&mut domain, &expected, work);
    }
}

/// A file in memory that libpng reads through a callback.
struct Source<'a> {
    rest: &'a [u8],
    reads: u32,
    /// Where the next read makes the mistake.
    mistake: Option<*mut u8>,
}

unsafe extern "C" fn read(png: *mut c_void, buffer: *mut u8, length: usize) {
    // SAFETY: `decode_rows` sets the pointer and does not use the source meanwhile. The buffer has `length` bytes.
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

/// Decodes a PNG file row by row. The first read for a row makes the mistake, if there is one. Returns the number of
/// reads, and the rows.
fn decode_rows(file: &[u8], mistake: Option<*mut u8>) -> (u32, Vec<u8>) {
    let mut source = Source { rest: file, reads: 0, mistake: None };
    let source = &raw mut source;
    // SAFETY: the calls are in the order that libpng requires. Rows have the length that it returns. The source lives
    // across the calls.
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

pub(crate) fn reads_by_a_callback() {
    let mut domain = domain("libpng");
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
