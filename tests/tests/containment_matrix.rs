//! The containment matrix: writes from a domain to everything that is not its own, by every way to write. Each is
//! refused, and nothing changes; the same write outside a domain lands.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a sequence of C calls is one thing here")]

use std::cell::Cell;
use std::ffi::{CString, c_int, c_ulong, c_void};
use std::hint::black_box;
use std::sync::atomic::AtomicU64;

use pkru_userspace::capability::{SignalFrame, detect};
use pkru_userspace::{Access, Domain, Vault};
use support::{domain, suite, works};

suite! {
    every_way_to_every_place,
    a_vault_cannot_be_read,
    what_the_kernel_reads_for_a_domain,
}

const OLD: u64 = 0x0123_4567_89ab_cdef;
const NEW: u64 = 0xfeed_face_dead_beef;

#[link(name = "z")]
unsafe extern "C" {
    fn compress(out: *mut u8, out_size: *mut c_ulong, data: *const u8, size: c_ulong) -> c_int;
    fn uncompress(out: *mut u8, out_size: *mut c_ulong, data: *const u8, size: c_ulong) -> c_int;
}

unsafe extern "C" {
    static mut environ: *mut *mut std::ffi::c_char;
    /// In C's `.data` and `.bss`.
    static mut helper_data: u64;
    static mut helper_bss: u64;
}

/// What the ways of writing need.
struct Tools {
    /// `NEW`, compressed.
    packed: Vec<u8>,
    /// A pipe, to have the kernel write.
    pipe: [c_int; 2],
}

/// How an attempt to write ended: in a domain a way may also be told that it was refused.
type Written = bool;

/// A way to write the word `NEW` to an address, and its name.
type Way = (&'static str, fn(&Tools, *mut u64) -> Written);

const WAYS: [Way; 5] =
    [("store", store), ("memcpy", by_memcpy), ("slice", by_slice), ("zlib", by_zlib), ("read(2)", by_system_call)];

fn store(_: &Tools, target: *mut u64) -> Written {
    // SAFETY: none in a domain: this is the mistake. Outside, the test may write the target.
    unsafe { target.write_volatile(NEW) };
    true
}

fn by_memcpy(_: &Tools, target: *mut u64) -> Written {
    static WORD: u64 = NEW;
    // SAFETY: as in `store`.
    unsafe { libc::memcpy(target.cast(), (&raw const WORD).cast(), black_box(8)) };
    true
}

fn by_slice(_: &Tools, target: *mut u64) -> Written {
    // SAFETY: as in `store`.
    let slice = unsafe { std::slice::from_raw_parts_mut(black_box(target), black_box(1)) };
    slice[0] = NEW;
    true
}

fn by_zlib(tools: &Tools, target: *mut u64) -> Written {
    let mut size = 8;
    // SAFETY: as in `store`; zlib is told that there are 8 bytes.
    unsafe { uncompress(target.cast(), &raw mut size, tools.packed.as_ptr(), tools.packed.len() as c_ulong) == 0 }
}

fn by_system_call(tools: &Tools, target: *mut u64) -> Written {
    let word = NEW;
    // SAFETY: the word is readable; the kernel checks where it writes.
    unsafe {
        libc::write(tools.pipe[1], (&raw const word).cast(), 8);
        let written = libc::read(tools.pipe[0], target.cast(), 8) == 8;
        if !written {
            assert_eq!(*libc::__errno_location(), libc::EFAULT);
            let mut rest = 0u64;
            libc::read(tools.pipe[0], (&raw mut rest).cast(), 8);
        }
        written
    }
}

/// Something that a domain must not write.
struct Target {
    name: &'static str,
    address: *mut u64,
    /// A domain may read it.
    readable: bool,
    /// The page is read-only for everybody, and is made writable for the test, so that only the domain's rights are in
    /// the way.
    read_only: bool,
    /// The calling thread has rights to it, so that the control can be made directly.
    control: Control,
}

/// How the write outside the domain is made.
enum Control {
    Direct,
    /// In the domain that owns it.
    Owner(Box<Domain>),
}

impl Target {
    fn new(name: &'static str, address: *mut u64) -> Self {
        Self { name, address, readable: true, read_only: false, control: Control::Direct }
    }

    fn read_only(name: &'static str, address: *const u64) -> Self {
        Self { read_only: true, ..Self::new(name, address.cast_mut()) }
    }

    fn owned(name: &'static str, address: u64, owner: Domain) -> Self {
        Self { readable: false, control: Control::Owner(Box::new(owner)), ..Self::new(name, address as *mut u64) }
    }

    fn value(&self) -> u64 {
        // SAFETY: the test may read all targets, other domains' memory included, to which its thread has rights.
        unsafe { self.address.read_volatile() }
    }
}

/// Makes the page of an address writable for everybody who has rights to it.
fn make_writable(address: *mut u64) {
    let page = address.map_addr(|address| address & !4095);
    let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    // SAFETY: the page stays mapped, with what it holds.
    assert_eq!(unsafe { libc::mprotect(page.cast::<c_void>(), 4096, all) }, 0);
}

/// A word of the alternate signal stack that the kernel has for this thread.
fn signal_stack() -> *mut u64 {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the struct is writable.
    unsafe { libc::syscall(libc::SYS_sigaltstack, std::ptr::null::<libc::stack_t>(), &raw mut stack) };
    stack.ss_sp.cast()
}

/// Loads another copy of zlib; returns an address in its writable data.
fn opened_later() -> *mut u64 {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let path = |line: &str| line.split_whitespace().nth(5).map(String::from);
    let original = maps.lines().filter_map(path).find(|path| path.contains("libz.so")).unwrap();
    let copy = std::env::temp_dir().join(format!("libcopy-{}.so", std::process::id()));
    std::fs::copy(original, &copy).unwrap();
    let name = CString::new(copy.to_str().unwrap()).unwrap();
    // SAFETY: zlib's constructors have no preconditions.
    assert!(!unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) }.is_null());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("libcopy") && line.contains("rw-p")).unwrap();
    std::fs::remove_file(copy).unwrap();
    let end = line.split(['-', ' ']).nth(1).unwrap();
    (usize::from_str_radix(end, 16).unwrap() - 16) as *mut u64
}

fn mapped_later() -> *mut u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping touches nothing that exists.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    page.cast()
}

/// A function that nobody calls, to be overwritten.
#[unsafe(naked)]
extern "C" fn code() {
    std::arch::naked_asm!(".p2align 12", "2: .fill 16, 1, 0xcc")
}

/// The slot of the global offset table that holds the address of `environ`.
fn offset_table() -> *const u64 {
    let slot;
    // SAFETY: it computes an address.
    unsafe { std::arch::asm!("lea {}, [rip + {}@GOTPCREL]", out(reg) slot, sym environ, options(nomem, nostack)) };
    slot
}

/// In any context: the thread pointer.
fn thread_pointer() -> u64 {
    let base;
    // SAFETY: the ABI puts the thread pointer at FS:0.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) base) };
    base
}

/// `__private_tm` in the thread control block, which nothing uses (glibc 2.36, `sysdeps/x86_64/nptl/tls.h`).
const UNUSED_IN_TCB: u64 = 80;

fn every_way_to_every_place() {
    static RUST: AtomicU64 = AtomicU64::new(OLD);
    static CONSTANT: [u64; 512] = [OLD; 512];
    thread_local! { static LOCAL: Cell<u64> = const { Cell::new(OLD) } }

    let mut writer = domain("writer");
    let tools = tools();
    let mut heap = Box::new(OLD);
    let mut stack = OLD;
    let owner = |name| Domain::builder(name).build().unwrap();
    let (mut of_heap, mut of_stack, mut of_locals) = (owner("heap"), owner("stack"), owner("locals"));
    let in_heap = of_heap.call(|| Box::leak(Box::new(OLD)) as *mut u64 as u64).unwrap();
    // Far below what calls use.
    let on_stack = of_stack.call(|| (&raw const *black_box(&OLD.swap_bytes())) as u64 - (256 << 10)).unwrap();
    let in_locals = of_locals.call(|| thread_pointer() + UNUSED_IN_TCB).unwrap();
    let [monitor, gate] = pkru_userspace::trusted_pages();

    let mut targets = vec![
        Target::new("the caller's heap", &raw mut *heap),
        Target::new("the caller's stack", &raw mut stack),
        Target::new(".data of the program", &raw mut helper_data),
        Target::new(".bss of the program", &raw mut helper_bss),
        Target::new("a Rust static", RUST.as_ptr()),
        Target::new("a library's data", (&raw mut environ).cast()),
        Target::read_only("the global offset table", offset_table()),
        // SAFETY: errno is this thread's own.
        Target::new("the caller's errno", unsafe { libc::__errno_location() }.cast::<u64>().map_addr(|at| at & !7)),
        Target::new("the caller's thread-locals", LOCAL.with(Cell::as_ptr)),
        Target::new("the thread control block", (thread_pointer() + UNUSED_IN_TCB) as *mut u64),
        Target::owned("another domain's heap", in_heap, of_heap),
        Target::owned("another domain's stack", on_stack & !7, of_stack),
        Target::owned("another domain's thread-locals", in_locals, of_locals),
        // The ends of these pages are not in use.
        Target::new("the gate's data", (gate.end - 16) as *mut u64),
        Target::new("the monitor's data", (monitor.end - 16) as *mut u64),
        Target::read_only("code", (code as *const ()).cast()),
        Target::read_only("read-only data", &raw const CONSTANT[300]),
        Target::new("memory mapped later", mapped_later()),
        Target::new("a library opened later", opened_later()),
    ];
    if detect().unwrap().signal_frame == SignalFrame::OnAnyStack {
        targets.push(Target::new("the signal stack", signal_stack()));
    } else {
        println!("figure: the signal stack: open to domains before Linux 6.12, or no signal could be taken in one");
    }

    let head: String = WAYS.iter().map(|(way, _)| format!("{way:>9}")).collect();
    println!("figure: {:<32}{head}{:>10}{:>9}", "write from a domain to", "reading", "outside");
    for target in &mut targets {
        let cells = row(&tools, &mut writer, target);
        println!("figure: {:<32}{cells}", target.name);
    }
}

fn tools() -> Tools {
    let mut tools = Tools { packed: vec![0; 64], pipe: [0; 2] };
    let mut size = tools.packed.len() as c_ulong;
    let word = NEW;
    // SAFETY: the buffers are as long as is said.
    assert_eq!(unsafe { compress(tools.packed.as_mut_ptr(), &raw mut size, (&raw const word).cast(), 8) }, 0);
    tools.packed.truncate(size as usize);
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(tools.pipe.as_mut_ptr()) }, 0);
    tools
}

/// Tries every way to write a target; returns a row of the table.
fn row(tools: &Tools, writer: &mut Domain, target: &mut Target) -> String {
    let address = target.address;
    if target.read_only {
        make_writable(address);
    }
    let mut cells = String::new();
    for (name, way) in WAYS {
        let old = target.value();
        let cell = match writer.call(|| way(tools, address)) {
            Err(violation) => {
                let fault = support::key_fault(&violation);
                assert_eq!(fault.access, Access::Write, "{}, {name}", target.name);
                // Some ways begin with another byte of the word.
                assert!(fault.address.abs_diff(address as u64) < 8, "{}, {name}: {violation}", target.name);
                "stopped"
            }
            Ok(false) => "refused",
            Ok(true) => panic!("{}, {name}: it was written", target.name),
        };
        assert_eq!(target.value(), old, "{}, {name}: nothing was written", target.name);
        cells.push_str(&format!("{cell:>9}"));
        works(writer);
    }
    // SAFETY: none, where it is refused.
    let read = writer.call(|| unsafe { address.read_volatile() });
    match (&read, target.readable) {
        (Ok(value), true) => assert!(*value == target.value() || target.name.contains("errno"), "{}", target.name),
        (Err(violation), false) => assert_eq!(violation.access(), Some(Access::Read)),
        _ => panic!("{}: reading: {read:?}", target.name),
    }
    cells.push_str(&format!("{:>10}", if read.is_ok() { "allowed" } else { "stopped" }));
    control(tools, target);
    cells.push_str(&format!("{:>9}", "lands"));
    cells
}

/// Writes the target outside the domain, by every way, and makes it what it was.
fn control(tools: &Tools, target: &mut Target) {
    let (address, old) = (target.address, target.value());
    for (name, way) in WAYS {
        // Of errno itself a system call that succeeds changes nothing.
        let (written, new) = match &mut target.control {
            Control::Direct => {
                let written = way(tools, address);
                // SAFETY: the test may read it; nothing else uses it meanwhile.
                let new = unsafe { address.read_volatile() };
                // SAFETY: it gets the value that it had.
                unsafe { address.write_volatile(old) };
                (written, new)
            }
            Control::Owner(owner) => {
                let written = owner.call(|| way(tools, address)).unwrap();
                // SAFETY: this thread has rights to the memory of domains that it has called.
                let new = unsafe { address.read_volatile() };
                (written, new)
            }
        };
        assert!(written && new == NEW, "{}, {name}: control: {new:#x}", target.name);
    }
}

fn a_vault_cannot_be_read() {
    let mut reader = domain("reader");
    let vault = Vault::new(OLD).unwrap();
    let address = vault.as_ptr();
    // SAFETY: none: this is the mistake.
    let violation = reader.call(|| unsafe { address.read_volatile() }).unwrap_err();
    assert_eq!(violation.access(), Some(Access::Read));
    assert_eq!(vault.with(|value| *value), OLD, "control");
}

fn what_the_kernel_reads_for_a_domain() {
    // A system call that reads the memory of another domain on the domain's behalf is refused too.
    let mut curious = domain("curious");
    let mut other = Domain::builder("other").build().unwrap();
    let word = other.call(|| Box::leak(Box::new(OLD)) as *mut u64 as u64).unwrap() as *const c_void;
    let tools = tools();
    // SAFETY: the kernel checks where it reads.
    let send = || unsafe { libc::write(tools.pipe[1], word, 8) as i64 };
    assert_eq!(curious.call(send).unwrap(), -1);
    assert_eq!(other.call(send).unwrap(), 8, "control");
}
