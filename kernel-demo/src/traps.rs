//! Exceptions and interrupts, and what they do with access rights.
//!
//! Each vector has a naked stub on a stack of its own that saves the registers and calls [`dispatch`]. That saves the
//! rights in force, opens all, handles the trap, and restores the saved rights: a trap in a domain neither inherits the
//! domain's rights nor lends it the kernel's. Three kinds of exception are expected: one in a domain, which is rewound;
//! one of a [`probe`](crate::probe); and none else, which ends the run.

use core::arch::{asm, naked_asm};
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use pkru::KeyRights;
use pkru::fault::{ErrorCode, PageFault};
use spin::{Mutex, Once};
use x86_64::VirtAddr;
use x86_64::registers::control::Cr2;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::fence::{self, Fence, Rights};
use crate::segments::TrapStack;
use crate::{exit, memory, probe, timer};

/// The registers at a trap, as the stub and the CPU pushed them.
#[derive(Debug)]
#[repr(C)]
pub struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    /// R10.
    pub r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    /// RAX.
    pub rax: u64,
    vector: u64,
    error: u64,
    /// RIP.
    pub instruction: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const PAGE_FAULT: u64 = 14;

/// The vectors of interrupts: the timer's, and one for `int`.
pub(crate) const TIMER: u8 = 0x20;
/// The vector of [`software_interrupt`].
pub const SOFTWARE: u8 = 0x40;

/// RFLAGS bits that a domain may have set and that must not outlive it: TF, DF, NT, AC.
const DOMAIN_FLAGS: u64 = 1 << 8 | 1 << 10 | 1 << 14 | 1 << 18;

/// An exception, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trap {
    /// What it was.
    pub cause: Cause,
    /// The instruction that raised it.
    pub instruction: u64,
    /// The rights in force.
    pub rights: Rights,
}

/// What an exception was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A page fault.
    PageFault(PageFault),
    /// Another exception, by its vector.
    Exception(u8),
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::PageFault(fault) => fault.fmt(f)?,
            Cause::Exception(0) => f.write_str("division by zero")?,
            Cause::Exception(6) => f.write_str("invalid instruction")?,
            Cause::Exception(8) => f.write_str("double fault")?,
            Cause::Exception(13) => f.write_str("general protection fault")?,
            Cause::Exception(vector) => write!(f, "exception {vector}")?,
        }
        write!(f, ", at instruction {:#x}", self.instruction)
    }
}

/// The trap that ended the last rewound call.
static LAST: Mutex<Option<Trap>> = Mutex::new(None);

pub(crate) fn take_last() -> Option<Trap> {
    LAST.lock().take()
}

/// What runs on [`SOFTWARE`], if anything: a function pointer, or 0.
static SOFTWARE_HANDLER: AtomicUsize = AtomicUsize::new(0);

/// Sets what runs, with the kernel's rights, on the interrupt [`SOFTWARE`]; it is given the rights that were in force.
pub fn on_software_interrupt(handler: fn(Rights)) {
    SOFTWARE_HANDLER.store(handler as usize, Ordering::Relaxed);
}

/// Raises the interrupt [`SOFTWARE`].
pub fn software_interrupt() {
    // SAFETY: the vector has a handler, which returns with everything as it was.
    unsafe { asm!("int {}", const SOFTWARE) };
}

extern "C" fn dispatch(frame: &mut Frame) {
    let mut rights = fence::open();
    match u8::try_from(frame.vector) {
        Ok(TIMER) => timer::tick(rights),
        Ok(SOFTWARE) => {
            let handler = SOFTWARE_HANDLER.load(Ordering::Relaxed);
            if handler != 0 {
                // SAFETY: only `on_software_interrupt` stores here.
                let handler: fn(Rights) = unsafe { core::mem::transmute(handler) };
                handler(rights);
            }
        }
        _ => exception(frame, &mut rights),
    }
    // SAFETY: the interrupted code ran with these rights, or the rewound caller did; what is left of this handler uses
    // its own stack, which every domain may write.
    unsafe { fence::write(rights) };
}

fn exception(frame: &mut Frame, rights: &mut Rights) {
    let trap = decode(frame, *rights);
    if let Some(after) = probe::resume_after(frame.instruction) {
        probe::record(&trap);
        frame.instruction = after;
        return;
    }
    let fence = Fence::current();
    let gate = fence.gate();
    let Some(context) = gate.running(rights.behind(fence)) else {
        exit::fail(format_args!("unexpected trap: {trap}\n{frame:#x?}"));
    };
    // SAFETY: there is one CPU, and the trap struck with this context's rights.
    let rewind = unsafe { gate.rewind(context) };
    *LAST.lock() = Some(trap);
    frame.instruction = rewind.instruction;
    frame.rsp = rewind.stack;
    frame.r10 = rewind.r10;
    frame.rflags &= !DOMAIN_FLAGS;
    // SAFETY: the caller had this FS base, and this handler uses none.
    unsafe { pkru::instructions::wrfsbase(rewind.fs_base) };
    rights.set_behind(fence, rewind.rights);
    // A domain in ring 0 can have changed the other register too; the kernel's rights to it are all.
    match fence {
        Fence::Pks => rights.pkru = KeyRights::ALL,
        Fence::Pku => rights.pkrs = KeyRights::ALL,
    }
}

fn decode(frame: &Frame, rights: Rights) -> Trap {
    let cause = if frame.vector == PAGE_FAULT {
        let address = Cr2::read_raw();
        let leaf = VirtAddr::try_new(address).ok().and_then(memory::leaf);
        let of_page = leaf.map_or(KeyRights::ALL, |leaf| rights.of(leaf.is_user()));
        let code = ErrorCode::from_bits_retain(frame.error as u32);
        Cause::PageFault(PageFault::decode(code, address, leaf.map_or(0, |leaf| leaf.entry), of_page))
    } else {
        Cause::Exception(frame.vector as u8)
    };
    Trap { cause, instruction: frame.instruction, rights }
}

/// The end of every stub: vector and error code are on the stack.
#[unsafe(naked)]
unsafe extern "C" fn common() {
    naked_asm!(
        "push rax",
        "push rbx",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push rbp",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "cld",
        "mov rdi, rsp",
        "call {dispatch}",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rbp",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop rbx",
        "pop rax",
        "add rsp, 16",
        "iretq",
        dispatch = sym dispatch,
    )
}

/// Defines a stub and returns its address. The CPU pushes an error code for some exceptions; for the others the stub
/// does.
macro_rules! stub {
    ($vector:literal) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn stub() {
            naked_asm!("push 0", concat!("push ", $vector), "jmp {common}", common = sym common)
        }
        VirtAddr::new(stub as unsafe extern "C" fn() as usize as u64)
    }};
    ($vector:literal with error code) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn stub() {
            naked_asm!(concat!("push ", $vector), "jmp {common}", common = sym common)
        }
        VirtAddr::new(stub as unsafe extern "C" fn() as usize as u64)
    }};
}

pub(crate) fn init() {
    static IDT: Once<InterruptDescriptorTable> = Once::new();
    let table = IDT.call_once(|| {
        let mut table = InterruptDescriptorTable::new();
        macro_rules! set {
            ($entry:expr, $stub:expr, $stack:expr) => {{
                // SAFETY: the stub saves and restores all registers and pops what the CPU pushed.
                let options = unsafe { $entry.set_handler_addr($stub) };
                // SAFETY: the stack is in the task state segment, and no trap handler runs on it meanwhile: handlers
                // run with interrupts off and cause no exception that is not the end of the run.
                unsafe { options.set_stack_index($stack as u16) };
            }};
        }
        set!(table.divide_error, stub!(0), TrapStack::Exception);
        set!(table.debug, stub!(1), TrapStack::Exception);
        set!(table.non_maskable_interrupt, stub!(2), TrapStack::DoubleFault);
        set!(table.breakpoint, stub!(3), TrapStack::Exception);
        set!(table.overflow, stub!(4), TrapStack::Exception);
        set!(table.bound_range_exceeded, stub!(5), TrapStack::Exception);
        set!(table.invalid_opcode, stub!(6), TrapStack::Exception);
        set!(table.device_not_available, stub!(7), TrapStack::Exception);
        set!(table.double_fault, stub!(8 with error code), TrapStack::DoubleFault);
        set!(table.invalid_tss, stub!(10 with error code), TrapStack::Exception);
        set!(table.segment_not_present, stub!(11 with error code), TrapStack::Exception);
        set!(table.stack_segment_fault, stub!(12 with error code), TrapStack::Exception);
        set!(table.general_protection_fault, stub!(13 with error code), TrapStack::Exception);
        set!(table.page_fault, stub!(14 with error code), TrapStack::Exception);
        set!(table.x87_floating_point, stub!(16), TrapStack::Exception);
        set!(table.alignment_check, stub!(17 with error code), TrapStack::Exception);
        set!(table.simd_floating_point, stub!(19), TrapStack::Exception);
        set!(table[TIMER], stub!(0x20), TrapStack::Interrupt);
        set!(table[SOFTWARE], stub!(0x40), TrapStack::Interrupt);
        table
    });
    table.load();
}
