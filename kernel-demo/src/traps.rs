//! The IDT, and what exceptions and interrupts do with access rights.
//!
//! Each vector has a naked stub, which saves the registers on a stack of the kernel's and calls `dispatch`. `dispatch`
//! reads the rights in force, gives itself all rights, handles the trap, and restores the rights. So a handler never
//! runs with a domain's rights, and a domain never runs with the kernel's.
//!
//! An exception in a domain rewinds the domain. An exception of a [`probe`] is recorded. Any other exception ends the
//! run.

#![expect(unsafe_code, reason = "the entry stubs are naked functions, and a rewind changes what the CPU returns to")]

use core::arch::{asm, naked_asm};

use pkru::KeyRights;
use pkru::fault::{ErrorCode, PageFault};
use spin::{Mutex, Once};
use x86_64::VirtAddr;
use x86_64::registers::control::Cr2;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::fence::{self, Fence, Rights};
use crate::segments::TrapStack;
use crate::trap::{Cause, Frame, PAGE_FAULT, SOFTWARE, TIMER, Trap};
use crate::{exit, memory, probe, timer};

/// The trap of the last rewind.
static LAST: Mutex<Option<Trap>> = Mutex::new(None);

/// Takes the trap of the last rewind.
pub(crate) fn take_last() -> Option<Trap> {
    LAST.lock().take()
}

/// The handler of the software interrupt.
static SOFTWARE_HANDLER: Mutex<Option<fn(Rights)>> = Mutex::new(None);

/// Sets the handler of the software interrupt. It runs with all rights; its argument is the interrupted code's rights.
pub fn on_software_interrupt(handler: fn(Rights)) {
    *SOFTWARE_HANDLER.lock() = Some(handler);
}

/// Raises the software interrupt.
pub fn software_interrupt() {
    // SAFETY: `init` has set a handler for the vector, and its stub restores every register.
    unsafe { asm!("int {}", const SOFTWARE) };
}

/// Raises an invalid-opcode exception, which ends the call in a domain and ends the run elsewhere.
pub(crate) fn invalid_opcode() -> ! {
    // SAFETY: UD2 always raises #UD, and the handler never returns to it.
    unsafe { asm!("ud2", options(noreturn)) };
}

extern "C" fn dispatch(frame: &mut Frame) {
    let mut rights = fence::open();
    match u8::try_from(frame.vector) {
        Ok(TIMER) => timer::tick(rights),
        Ok(SOFTWARE) => {
            // The lock is free again when the handler runs.
            let handler = *SOFTWARE_HANDLER.lock();
            if let Some(handler) = handler {
                handler(rights);
            }
        }
        _ => exception(frame, &mut rights),
    }
    // SAFETY: the code that the trap returns to ran with these rights. Until then only this trap's stack is written,
    // and every domain may write that.
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
    // SAFETY: the rights were in force at the trap, and the kernel has one CPU.
    let Some(context) = (unsafe { gate.running(rights.behind(fence)) }) else {
        exit::fail(format_args!("unexpected trap: {trap}\n{frame:#x?}"));
    };
    // SAFETY: the kernel has one CPU, the trap was raised with this context's rights, and `frame` and `rights` below take
    // over the returned state unchanged.
    let rewind = unsafe { gate.rewind(context) };
    *LAST.lock() = Some(trap);
    frame.rewind(&rewind);
    // SAFETY: a domain ran, so CR4.FSGSBASE is 1. The base is the caller's, and the kernel reads nothing through FS.
    unsafe { pkru::instructions::wrfsbase(rewind.fs_base) };
    rights.set_behind(fence, rewind.rights);
    // Code in a domain may have written the other register, for it runs in ring 0. The kernel has all rights there.
    match fence {
        Fence::Pks => rights.pkru = KeyRights::ALL,
        Fence::Pku => rights.pkrs = KeyRights::ALL,
    }
}

/// Decodes an exception from its frame, and a page fault also from CR2 and the page tables.
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

/// Completes the [`Frame`], calls [`dispatch`], and returns from the trap. The vector and the error code are on the
/// stack.
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

/// Defines an entry stub and returns its address. The stub pushes an error code of 0 where the CPU pushes none.
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

/// Loads the IDT.
pub(crate) fn init() {
    static IDT: Once<InterruptDescriptorTable> = Once::new();
    let table = IDT.call_once(|| {
        let mut table = InterruptDescriptorTable::new();
        macro_rules! set {
            ($entry:expr, $stub:expr, $stack:expr) => {{
                // SAFETY: the stub restores every register and ends with IRETQ. The `stub!` below pushes an error code
                // exactly where the CPU does not.
                let options = unsafe { $entry.set_handler_addr($stub) };
                // SAFETY: the loaded task state segment holds the stack. No two handlers share it at a time: interrupts
                // are off in a handler, and an exception in one ends the run.
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
