//! The containment matrix: a domain writes to each kind of memory that is not its own, in several ways.
//!
//! Each write is refused and changes nothing. As a control, the same write outside the domain succeeds.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a mistake or a few C calls read better as one block")]

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
    /// In `.data` and `.bss` of the C code.
    static mut helper_data: u64;
    static mut helper_bss: u64;
}

/// Data that the ways of writing use.
struct Tools {
    /// `NEW`, compressed.
    packed: Vec<u8>,
    /// A pipe, for writes by the kernel.
    pipe: [c_int; 2],
}

/// Whether the write succeeded. `false` if the way reports that it was refused.
type Written = bool;

/// The name of a way to write, and a function that writes the word `NEW` to an address.
type Way = (&'static str, fn(&Tools, *mut u64) -> Written);

const WAYS: [Way; 5] =
    [("store", store), ("memcpy", by_memcpy), ("slice", by_slice), ("zlib", by_zlib), ("read(2)", by_system_call)];

fn store(_: &Tools, target: *mut u64) -> Written {
    // SAFETY: deliberately unsound in a domain. Outside, the test may write the target.
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
    // SAFETY: as in `store`. The size argument is 8.
    unsafe { uncompress(target.cast(), &raw mut size, tools.packed.as_ptr(), tools.packed.len() as c_ulong) == 0 }
}

fn by_system_call(tools: &Tools, target: *mut u64) -> Written {
    let word = NEW;
    // SAFETY: the word is readable, and the kernel checks the target.
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

/// Memory that a domain must not write.
struct Target {
    name: &'static str,
    address: *mut u64,
    /// The domain may read it.
    readable: bool,
    /// The page is read-only for all code. The test makes it writable, so that only the domain's rights prevent the
    /// write.
    read_only: bool,
    /// How the control writes it.
    control: Control,
}

/// How the control writes.
enum Control {
    /// Outside any domain.
    Direct,
    /// In the domain that owns the memory.
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
        // SAFETY: the thread has rights to all targets, including the memory of other domains.
        unsafe { self.address.read_volatile() }
    }
}

/// Makes the page of an address writable for all code with rights to its key.
fn make_writable(address: *mut u64) {
    let page = address.map_addr(|address| address & !4095);
    let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    // SAFETY: the page stays mapped and keeps its contents.
    assert_eq!(unsafe { libc::mprotect(page.cast::<c_void>(), 4096, all) }, 0);
}

/// Returns the address of this thread's alternate signal stack in the kernel.
fn signal_stack() -> *mut u64 {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the struct is writable.
    unsafe { libc::syscall(libc::SYS_sigaltstack, std::ptr::null::<libc::stack_t>(), &raw mut stack) };
    stack.ss_sp.cast()
}

/// Loads a copy of zlib. Returns an address in its writable data.
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

/// A function that is never called, so that the test can overwrite it.
#[unsafe(naked)]
extern "C" fn code() {
    std::arch::naked_asm!(".p2align 12", "2: .fill 16, 1, 0xcc")
}

/// Returns the slot of the global offset table with the address of `environ`.
fn offset_table() -> *const u64 {
    let slot;
    // SAFETY: the instruction only computes an address.
    unsafe { std::arch::asm!("lea {}, [rip + {}@GOTPCREL]", out(reg) slot, sym environ, options(nomem, nostack)) };
    slot
}

/// Returns the thread pointer of the running code, in a domain or outside.
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
    // Far below the part that calls use.
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
        // The ends of these pages are unused.
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
        println!("figure: the signal stack: not tested, because domains must be able to write it before Linux 6.12");
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
    // SAFETY: the buffers have these sizes.
    assert_eq!(unsafe { compress(tools.packed.as_mut_ptr(), &raw mut size, (&raw const word).cast(), 8) }, 0);
    tools.packed.truncate(size as usize);
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(tools.pipe.as_mut_ptr()) }, 0);
    tools
}

/// Tries all ways to write a target. Returns a row of the table.
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
                // Some ways do not write the first byte first.
                assert!(fault.address.abs_diff(address as u64) < 8, "{}, {name}: {violation}", target.name);
                "stopped"
            }
            Ok(false) => "refused",
            Ok(true) => panic!("{}, {name}: the write succeeded", target.name),
        };
        assert_eq!(target.value(), old, "{}, {name}: the target changed", target.name);
        cells.push_str(&format!("{cell:>9}"));
        works(writer);
    }
    // SAFETY: deliberately unsound where the read must be refused.
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

/// Writes the target outside the domain in all ways, and restores it.
fn control(tools: &Tools, target: &mut Target) {
    let (address, old) = (target.address, target.value());
    for (name, way) in WAYS {
        // A successful system call does not change errno, which is one of the targets.
        let (written, new) = match &mut target.control {
            Control::Direct => {
                let written = way(tools, address);
                // SAFETY: the test may read the target, and nothing else uses it meanwhile.
                let new = unsafe { address.read_volatile() };
                // SAFETY: this restores the old value.
                unsafe { address.write_volatile(old) };
                (written, new)
            }
            Control::Owner(owner) => {
                let written = owner.call(|| way(tools, address)).unwrap();
                // SAFETY: this thread has called the domain, so it has rights to its memory.
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
    // SAFETY: deliberately unsound: the mistake under test.
    let violation = reader.call(|| unsafe { address.read_volatile() }).unwrap_err();
    assert_eq!(violation.access(), Some(Access::Read));
    assert_eq!(vault.with(|value| *value), OLD, "control");
}

fn what_the_kernel_reads_for_a_domain() {
    // The kernel refuses to read another domain's memory for a system call in a domain.
    let mut curious = domain("curious");
    let mut other = Domain::builder("other").build().unwrap();
    let word = other.call(|| Box::leak(Box::new(OLD)) as *mut u64 as u64).unwrap() as *const c_void;
    let tools = tools();
    // SAFETY: the kernel checks the source.
    let send = || unsafe { libc::write(tools.pipe[1], word, 8) as i64 };
    assert_eq!(curious.call(send).unwrap(), -1);
    assert_eq!(other.call(send).unwrap(), 8, "control");
}
