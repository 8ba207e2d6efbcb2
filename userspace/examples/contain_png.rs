//! Decodes PNG files with the system's libpng in a domain, and shows how wrong writes are stopped.
//!
//!     cargo run --release --example contain_png -- FILE…
//!
//! The caller of a decoder passes the address of the output buffer. This example passes four wrong addresses: the
//! caller's heap, its stack, a static, and the memory of another domain. Each time libpng's write is stopped, the
//! memory is unchanged, and the next file decodes. If a picture is larger than these targets, the example uses its
//! upper left corner instead.

use std::cell::UnsafeCell;
use std::fmt;
use std::path::Path;
use std::process::ExitCode;

use pkru_userspace::transfer::{DomainMemory, InvalidResult, Transfer};
use pkru_userspace::{Domain, Violation};

/// libpng's simplified interface, from `png.h`.
mod libpng {
    use std::ffi::{c_char, c_int, c_void};

    #[repr(C)]
    pub(super) struct Image {
        pub(super) opaque: *mut c_void,
        pub(super) version: u32,
        pub(super) width: u32,
        pub(super) height: u32,
        pub(super) format: u32,
        pub(super) flags: u32,
        pub(super) colormap_entries: u32,
        pub(super) warning_or_error: u32,
        pub(super) message: [c_char; 64],
    }

    pub(super) const VERSION: u32 = 1;
    pub(super) const FORMAT_RGBA: u32 = 3;
    pub(super) const ERROR: u32 = 2;

    #[link(name = "png16")]
    unsafe extern "C" {
        pub(super) fn png_image_begin_read_from_memory(image: *mut Image, memory: *const c_void, size: usize) -> c_int;
        pub(super) fn png_image_finish_read(
            image: *mut Image,
            background: *const c_void,
            buffer: *mut c_void,
            row_stride: i32,
            colormap: *mut c_void,
        ) -> c_int;
        pub(super) fn png_image_write_to_memory(
            image: *mut Image,
            memory: *mut c_void,
            size: *mut usize,
            convert_to_8_bit: c_int,
            buffer: *const c_void,
            row_stride: i32,
            colormap: *const c_void,
        ) -> c_int;
        pub(super) fn png_image_free(image: *mut Image);
    }
}

/// A picture with four bytes per pixel: red, green, blue, alpha.
#[derive(PartialEq)]
struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Transfer for Picture {
    type Wire = <(u32, u32, Vec<u8>) as Transfer>::Wire;

    fn into_wire(self) -> Self::Wire {
        (self.width, self.height, self.pixels).into_wire()
    }

    fn from_wire(wire: &Self::Wire, memory: &DomainMemory<'_>) -> Result<Self, InvalidResult> {
        let (width, height, pixels) = Transfer::from_wire(wire, memory)?;
        Ok(Self { width, height, pixels })
    }
}

impl fmt::Display for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{} pixels, checksum {:08x}", self.width, self.height, checksum(&self.pixels))
    }
}

impl libpng::Image {
    /// An empty image.
    const NEW: Self = Self {
        opaque: std::ptr::null_mut(),
        version: libpng::VERSION,
        width: 0,
        height: 0,
        format: 0,
        flags: 0,
        colormap_entries: 0,
        warning_or_error: 0,
        message: [0; 64],
    };
}

/// Decodes a PNG file. The pixels go to `target`, or to a new vector if that is `None`.
fn decode(file: &[u8], target: Option<*mut u8>) -> Result<Picture, String> {
    let mut image = libpng::Image::NEW;
    // SAFETY: the image is initialised as libpng requires, and the file's bytes live across the calls.
    unsafe { libpng::png_image_begin_read_from_memory(&raw mut image, file.as_ptr().cast(), file.len()) };
    check(&image)?;
    image.format = libpng::FORMAT_RGBA;
    let size = image.width as usize * image.height as usize * 4;
    let mut pixels = vec![0; if target.is_none() { size } else { 0 }];
    let buffer = target.unwrap_or(pixels.as_mut_ptr());
    // SAFETY: the vector has room for the picture. The wrong targets have too, so the control overwrites nothing else.
    unsafe {
        libpng::png_image_finish_read(&raw mut image, std::ptr::null(), buffer.cast(), 0, std::ptr::null_mut());
    }
    let result = check(&image);
    // SAFETY: the image was begun above.
    unsafe { libpng::png_image_free(&raw mut image) };
    result.map(|()| Picture { width: image.width, height: image.height, pixels })
}

fn check(image: &libpng::Image) -> Result<(), String> {
    if image.warning_or_error & libpng::ERROR == 0 {
        return Ok(());
    }
    let message = image.message.iter().map_while(|byte| (*byte != 0).then_some(*byte as u8 as char));
    Err(message.collect())
}

/// Encodes the upper left corner of a picture, so that it fits the wrong targets.
fn encode_corner(picture: &Picture) -> Result<Vec<u8>, String> {
    let (width, height) = (picture.width.min(CORNER), picture.height.min(CORNER));
    let mut image = libpng::Image { width, height, format: libpng::FORMAT_RGBA, ..libpng::Image::NEW };
    // Even an incompressible picture grows only a little.
    let mut file = vec![0; 2 * ROOM];
    let mut size = file.len();
    let stride = i32::try_from(picture.width * 4).map_err(|error| error.to_string())?;
    // SAFETY: the picture has rows of this stride, and at least as many as the image. The file has this size.
    unsafe {
        libpng::png_image_write_to_memory(
            &raw mut image,
            file.as_mut_ptr().cast(),
            &raw mut size,
            0,
            picture.pixels.as_ptr().cast(),
            stride,
            std::ptr::null(),
        );
    }
    check(&image)?;
    file.truncate(size);
    Ok(file)
}

fn decode_in(domain: &mut Domain, file: &[u8]) -> Result<Result<Picture, String>, Violation> {
    domain.call(|| decode(file, None))
}

/// Returns the size of the pixels that a file's header states, in bytes. The header is untrusted.
fn promised_size(file: &[u8]) -> usize {
    let word = |place| {
        file.get(place..place + 4).map_or(0, |bytes| bytes.iter().fold(0, |n, byte| n << 8 | usize::from(*byte)))
    };
    word(16).saturating_mul(word(20)).saturating_mul(4)
}

/// Returns the FNV-1a hash.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// The width and height of the largest square picture that fits the wrong targets.
const CORNER: u32 = 128;

/// The size of each wrong target, in bytes.
const ROOM: usize = CORNER as usize * CORNER as usize * 4;

struct Static(UnsafeCell<[u8; ROOM]>);

// SAFETY: this program has one thread.
unsafe impl Sync for Static {}

static STATIC: Static = Static(UnsafeCell::new([FILL; ROOM]));

/// The initial contents of the wrong targets.
const FILL: u8 = 0x5a;

fn main() -> ExitCode {
    let files: Vec<_> = std::env::args_os().skip(1).collect();
    if files.is_empty() {
        eprintln!("usage: contain_png FILE…");
        return ExitCode::from(2);
    }
    match demonstrate(&files) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(bad) => {
            println!("\n{bad} of {} files did not decode; the program continues", files.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate(files: &[impl AsRef<Path>]) -> Result<usize, String> {
    println!("== decoding in a domain ==");
    let mut contents: Vec<(String, Vec<u8>)> = Vec::new();
    for path in files.iter().map(AsRef::as_ref) {
        let name = path.file_name().unwrap_or(path.as_os_str()).display().to_string();
        match std::fs::read(path) {
            Ok(file) => contents.push((name, file)),
            Err(error) => println!("{name}: {error}"),
        }
    }
    let largest = contents.iter().map(|(_, file)| promised_size(file)).max().unwrap_or(0);
    let builder = Domain::builder("libpng").heap_size((64 << 20) + 2 * largest.min(1 << 30));
    let mut domain = builder.build().map_err(|error| error.to_string())?;

    let mut good: Vec<(String, Vec<u8>, Picture)> = Vec::new();
    for (name, file) in contents {
        match decode_in(&mut domain, &file) {
            Ok(Ok(picture)) => {
                let plain = decode(&file, None)?;
                let same = if picture == plain { "the same as" } else { "NOT the same as" };
                println!("{name}: {picture}; {same} a plain call decodes");
                if picture != plain {
                    return Err(format!("{name} decodes differently in a domain"));
                }
                good.push((name, file, picture));
            }
            Ok(Err(error)) => println!("{name}: libpng says: {error}"),
            Err(violation) => println!("{name}: {violation}"),
        }
    }
    let bad = files.len() - good.len();
    let Some((name, file, _)) = good.first() else {
        println!("\nno file was decoded, so the rest of the example is skipped");
        return Ok(bad);
    };

    println!("\n== damaged files ==");
    for (damage, file) in damage(file) {
        match decode_in(&mut domain, &file) {
            Ok(Ok(picture)) => println!("{name}, {damage}: {picture}"),
            Ok(Err(error)) => println!("{name}, {damage}: libpng says: {error}"),
            Err(violation) => println!("{name}, {damage}: {violation}"),
        }
    }

    println!("\n== calls with a wrong output buffer ==");
    let mut small = Vec::new();
    for (name, file, picture) in &good {
        if picture.pixels.len() <= ROOM {
            small.push(file.clone());
        } else {
            println!("{name} is larger than the wrong buffers; they get its upper left corner instead");
            small.push(encode_corner(picture)?);
        }
    }
    let mut heap = vec![FILL; ROOM];
    let mut stack = [FILL; ROOM];
    let mut other = Domain::builder("other").build().map_err(|error| error.to_string())?;
    let in_other =
        other.call(|| Vec::leak(vec![FILL; ROOM]).as_mut_ptr() as usize).map_err(|violation| violation.to_string())?;
    let places: [(&str, *mut u8); 4] = [
        ("the caller's heap", heap.as_mut_ptr()),
        ("the caller's stack", stack.as_mut_ptr()),
        ("a static", STATIC.0.get().cast()),
        ("another domain", in_other as *mut u8),
    ];
    for (number, (place, target)) in places.into_iter().enumerate() {
        let before = checksum(&read(target));
        let (name, file, expected) = &good[number % good.len()];
        println!("decoding {name} to {place}, checksum {before:08x}:");
        match domain.call(|| decode(&small[number % small.len()], Some(target)).map(drop)) {
            Err(violation) => println!("  stopped: {violation}"),
            Ok(result) => return Err(format!("the write to {place} was not stopped: {result:?}")),
        }
        let after = checksum(&read(target));
        println!("  checksum afterwards {after:08x}: {}", if before == after { "byte-identical" } else { "CHANGED" });
        if before != after {
            return Err(format!("{place} was changed"));
        }
        match decode_in(&mut domain, file) {
            Ok(Ok(picture)) if picture == *expected => println!("  the domain still works: {name}: {picture}"),
            Ok(Ok(picture)) => return Err(format!("{name} decodes differently after a violation: {picture}")),
            Ok(Err(error)) => return Err(format!("{name} does not decode after a violation: {error}")),
            Err(violation) => return Err(violation.to_string()),
        }
    }

    println!("\n== control: the same calls without a domain ==");
    for (number, (place, target)) in places.into_iter().enumerate() {
        let before = checksum(&read(target));
        decode(&small[number % small.len()], Some(target))?;
        let after = checksum(&read(target));
        println!("{place}: checksum {before:08x}, afterwards {after:08x}");
        if before == after {
            return Err(format!("the control did not write to {place}"));
        }
    }
    Ok(bad)
}

/// Copies one of the wrong targets.
fn read(place: *mut u8) -> Vec<u8> {
    // SAFETY: each target has `ROOM` bytes that code outside the domain may read. Nothing writes them meanwhile.
    unsafe { std::slice::from_raw_parts(place, ROOM) }.to_vec()
}

/// Returns damaged copies of a file.
fn damage(file: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut flipped = file.to_vec();
    for byte in flipped.iter_mut().skip(60).step_by(7) {
        *byte ^= 0x55;
    }
    let mut huge = file.to_vec();
    huge[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    vec![
        ("empty", Vec::new()),
        ("cut off in its header", file[..20].to_vec()),
        ("cut off in its data", file[..file.len() * 2 / 3].to_vec()),
        ("with bytes flipped", flipped),
        ("with an enormous size", huge),
        ("not a PNG at all", b"GIF89a, or so it says".repeat(10)),
    ]
}
