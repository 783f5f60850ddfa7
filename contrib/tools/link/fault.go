package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Fault is what a port does wrong. The kinds are described in main.go.
type Fault struct {
	Kind   string
	After  int64
	Wait   time.Duration
	Status int
}

func (f Fault) String() string {
	if f.Kind == "" {
		return "none"
	}
	return f.Kind
}

// severe: connections made before it or under it are of no use after a change.
func (f Fault) severe() bool { return f.Kind != "" && f.Kind != "slow" }

const kinds = "none refuse blackhole stall truncate reset flip slow status"

func parseFault(r *http.Request) (Fault, error) {
	f := Fault{Kind: r.FormValue("kind"), Wait: 5 * time.Second, Status: http.StatusInternalServerError}
	var err error
	if !strings.Contains(" "+kinds+" ", " "+f.Kind+" ") || f.Kind == "" {
		return f, fmt.Errorf("kind: %q is none of: %s", f.Kind, kinds)
	}
	if v := r.FormValue("after"); v != "" {
		if f.After, err = strconv.ParseInt(v, 10, 64); err != nil || f.After < 0 {
			return f, fmt.Errorf("after: %q is not a number of bytes", v)
		}
	}
	if v := r.FormValue("wait"); v != "" {
		if f.Wait, err = time.ParseDuration(v); err != nil || f.Wait < 0 {
			return f, fmt.Errorf("wait: %q is not a duration", v)
		}
	}
	if v := r.FormValue("status"); v != "" {
		if f.Status, err = strconv.Atoi(v); err != nil || f.Status < 200 || f.Status > 599 {
			return f, fmt.Errorf("status: %q is not an HTTP status", v)
		}
	}
	return f, nil
}

// SetFault switches a port to `f`.
func (p *Port) SetFault(f Fault) error {
	if f.Kind == "none" {
		f = Fault{}
	}
	p.mutex.Lock()
	was := p.fault
	p.fault = f
	listener := p.listener
	var open []*connection
	// A connection is to meet the new fault, or was spoilt by the old one.
	if f.severe() || was.severe() {
		for c := range p.open {
			open = append(open, c)
		}
	}
	if f.Kind == "refuse" {
		p.listener = nil
	}
	p.mutex.Unlock()
	for _, c := range open {
		c.end(true)
	}
	if f.Kind == "refuse" {
		if listener != nil {
			return listener.Close()
		}
		return nil
	}
	if listener != nil {
		return nil
	}
	again, err := net.Listen("tcp", p.Address)
	if err != nil {
		return err
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.serve(again)
	return nil
}

type verdict int

const (
	verdictPass verdict = iota
	verdictStall
	verdictClose
	verdictReset
)

func (p *Port) currentFault() Fault {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.fault
}

// goesUp sees every piece on its way to the server.
func (c *connection) goesUp(data []byte) ([]byte, verdict) {
	c.mutex.Lock()
	first := !c.requested || c.answering
	c.requested, c.answering = true, false
	if first {
		c.answered = 0
		c.port.requests.Add(1)
	}
	c.mutex.Unlock()
	if fault := c.port.currentFault(); first && fault.Kind == "slow" {
		select {
		case <-time.After(fault.Wait):
		case <-c.ended:
		}
	}
	return data, verdictPass
}

// comesDown sees every piece on its way to the client.
func (c *connection) comesDown(data []byte) ([]byte, verdict) {
	fault := c.port.currentFault()
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.answering = true
	before := c.answered
	c.answered += int64(len(data))
	end := verdictPass
	switch fault.Kind {
	case "stall":
		end = verdictStall
	case "truncate":
		end = verdictClose
	case "reset":
		end = verdictReset
	case "flip":
		if at := fault.After - before; at >= 0 && at < int64(len(data)) {
			data[at] ^= 1
		}
	}
	if end != verdictPass && c.answered >= fault.After {
		return data[:max(0, fault.After-before)], end
	}
	return data, verdictPass
}

// answerStatus answers every request on the connection with `status`.
func answerStatus(client net.Conn, status int) {
	reader := bufio.NewReader(client)
	for {
		request, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		if request.Header.Get("Expect") == "" {
			_, _ = io.Copy(io.Discard, request.Body)
		}
		text := fmt.Sprintf("this link answers %d\n", status)
		_, err = fmt.Fprintf(client, "HTTP/1.1 %d %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", status, http.StatusText(status), len(text))
		if err == nil && request.Method != http.MethodHead {
			_, err = io.WriteString(client, text)
		}
		if err != nil || request.Close || request.Header.Get("Expect") != "" {
			return
		}
	}
}
