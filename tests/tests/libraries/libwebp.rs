//! libwebp: encoding and decoding. It keeps locks and tables in statics, so a domain needs its data.

use super::*;

/// `WebPConfig`: 116 bytes, with some room to spare. Only libwebp accesses the fields.
#[repr(C, align(8))]
struct Config([u8; 256]);

type Writer = unsafe extern "C" fn(*const u8, usize, *const Picture) -> c_int;
type ProgressHook = unsafe extern "C" fn(c_int, *const Picture) -> c_int;

/// `WebPPicture` of libwebp 1.2.4, `webp/encode.h`.
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
    // SAFETY: the pixels have this size. The returned block has `size` bytes and is freed once.
    unsafe {
        let size =
            WebPEncodeRGBA(pixels.as_ptr(), WIDTH as c_int, HEIGHT as c_int, 4 * WIDTH as c_int, 75.0, &raw mut file);
        assert_ne!(size, 0);
        let copy = std::slice::from_raw_parts(file, size).to_vec();
        WebPFree(file.cast());
        copy
    }
}

fn decode(file: &[u8]) -> Vec<u8> {
    let (mut width, mut height) = (0, 0);
    // SAFETY: the returned block has four bytes for each pixel and is freed once.
    unsafe {
        let pixels = WebPDecodeRGBA(file.as_ptr(), file.len(), &raw mut width, &raw mut height);
        assert_eq!((width as usize, height as usize, pixels.is_null()), (WIDTH, HEIGHT, false));
        let copy = std::slice::from_raw_parts(pixels, 4 * WIDTH * HEIGHT).to_vec();
        WebPFree(pixels.cast());
        copy
    }
}

/// Decodes to `place`.
fn decode_into(file: &[u8], place: *mut u8) {
    // SAFETY: `place` has room for the picture. A domain must not write it.
    let result =
        unsafe { WebPDecodeRGBAInto(file.as_ptr(), file.len(), place, 4 * WIDTH * HEIGHT, 4 * WIDTH as c_int) };
    assert_eq!(result, place);
}

/// State of the callbacks that libwebp calls while it encodes.
struct Progress {
    steps: u32,
    written: usize,
    mistake: Option<*mut u8>,
}

unsafe extern "C" fn progress(percent: c_int, picture: *const Picture) -> c_int {
    // SAFETY: `encode_with_callbacks` sets the pointer and does not use the value meanwhile.
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

/// Encodes with callbacks. The progress callback makes the mistake, if there is one, half way. Returns the number of
/// its calls, and the file's size.
fn encode_with_callbacks(pixels: &[u8], mistake: Option<*mut u8>) -> (u32, u64) {
    let mut report = Progress { steps: 0, written: 0, mistake };
    let report = &raw mut report;
    // SAFETY: libwebp initialises the zeroed structs. The pixels have this size. The report lives across the calls.
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

/// Debian's libwebp locks a mutex in a static before each use of a lazily filled table, even if the table is filled.
pub(crate) fn without_its_data_it_cannot_work() {
    let pixels = picture();
    let is_the_lock = |domain: &mut Domain, work: &dyn Fn() -> Vec<u8>| {
        let violation = domain.call(work).expect_err("the write to a static must be stopped");
        assert_eq!(key_fault(&violation).access, Access::Write);
        let (target, symbol) = (violation.target().expect("a static"), violation.symbol().expect("a function"));
        assert!(target.library().to_string_lossy().contains("libwebp.so"), "{violation}");
        assert_eq!(symbol.name(), Some("pthread_mutex_lock"), "{violation}");
        let text = violation.to_string();
        assert!(text.contains("Builder::library"), "{text}");
        println!("figure: {}: {symbol} writes {target}", violation.domain());
    };
    let mut cold = domain("cold");
    is_the_lock(&mut cold, &|| encode(&pixels));
    let file = encode(&pixels);
    let mut warm = build(Domain::builder("warm").warm_up(|| decode(&file)));
    is_the_lock(&mut warm, &|| encode(&pixels));
    is_the_lock(&mut warm, &|| decode(&file));
}

pub(crate) fn with_its_data_it_encodes_and_decodes() {
    let pixels = picture();
    let mut cold = domain("cold");
    cold.call(|| encode(&pixels)).unwrap_err();
    let work = || {
        let file = encode(&pixels);
        let decoded = decode(&file);
        let told = encode_with_callbacks(&pixels, None);
        (file, decoded, told)
    };
    // The work outside comes first: while a domain has the library's data, other code must not use the library.
    let expected = work();
    let file = &expected.0;
    let difference = pixels.iter().zip(&expected.1).map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>();
    assert!(difference < 10 * pixels.len() as u64, "the picture is the same except for compression losses");
    println!("figure: {} bytes of pixels in a file of {}, off by {difference} in all", pixels.len(), file.len());
    println!("figure: {} reports of progress", expected.2.0);
    let decode_wrong = |place| decode_into(file, place);
    let encode_wrong = |place| {
        encode_with_callbacks(&pixels, Some(place));
    };
    lands(decode_wrong);
    lands(encode_wrong);

    // SAFETY: from here on, this process uses the library only in that domain.
    let mut domain = build(unsafe { Domain::builder("libwebp").library("libwebp.so") });
    works_as_outside(&mut domain, &expected, work);
    let target = Target::new();
    assert_in_library(&is_stopped(&mut domain, &target, decode_wrong), "libwebp.so");
    works_as_outside(&mut domain, &expected, work);
    assert_in_scribble(&is_stopped(&mut domain, &target, encode_wrong));
    works_as_outside(&mut domain, &expected, work);
}
